import json
from html.parser import HTMLParser

import pytest

from loraloom.cli import main as cli
from loraloom.errors import ConfigError
from loraloom.report.page import lay_out, make_page
from tests.report.made import evaluation, job_result, write_evaluation, write_run

VOID = {"meta", "link", "img"}


class Checked(HTMLParser):
    """Every element is closed in turn; gathers texts, tags and attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        assert self.open == []
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


@pytest.fixture
def page_of(run, tmp_path):
    """Make the page of a run and an evaluation."""
    return lambda content=None: make_page([run], [write_evaluation(tmp_path / "r.json", content)])


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    directory = tmp_path_factory.mktemp("page")
    return make_page([write_run(directory / "run")], [write_evaluation(directory / "r.json")])


def test_the_page_is_whole_and_needs_nothing_else(page):
    checked = Checked(page)
    heads = ("Jobs", "Results", "Learning curves", "Where mixtures send tokens", "top-2 of 8 exp")
    cells = ("a/base", "13.20 M", "loraloom train run.yaml", "2026-01-02", "+20.0 +10.0 to +30.0")
    for part in (*heads, *cells, "0.012 *"):
        assert part in checked.text
    assert checked.text.count("loraloom 0.1.0") == 2  # in the header and the footer
    assert checked.of("script") == []
    for tag, attributes in checked.tags:
        for name in ("src", "href"):
            if name in attributes:
                assert attributes[name].startswith(("#", "data:")), (tag, attributes)
    assert "url(" not in page


def test_charts_and_tables_have_names_for_screen_readers(page):
    checked = Checked(page)
    assert all(image["alt"] for image in checked.of("img"))
    assert all(svg["aria-hidden"] == "true" for svg in checked.of("svg"))
    assert all("scope" in header for header in checked.of("th"))
    ids = [attributes["id"] for _, attributes in checked.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)


def test_names_and_texts_from_files_are_escaped(tmp_path):
    bad = '<script>alert("1")</script>'
    run = write_run(tmp_path / "run", ["mix"])
    result = job_result("mix", 40, base_model=bad, warnings=[bad], error=bad)
    (run / "mix/result.json").write_text(json.dumps(result))
    (run / "mix").rename(run / "<b onclick=x>")
    content = evaluation([f"mix {bad}"], [bad, "piqa"])
    content["routing"][f"mix {bad}"]["tasks"][bad]["example"]["tokens"][0] = bad
    page = make_page([run], [write_evaluation(tmp_path / "result.json", content)])
    checked = Checked(page)
    assert "<script" not in page
    assert checked.of("b") == []
    assert any(bad in text for text in checked.texts)


def test_sections_say_what_is_not_there(run, page_of, tmp_path):
    text = Checked(make_page([run])).text
    assert "No evaluation was given" in text
    assert "No evaluation of a mixture was given" in text
    assert "No evaluation of a mixture was given" in page_of(evaluation(["lora"]))
    (run / "mix/result.json").unlink()
    text = Checked(make_page([run])).text
    assert "not ended, 40 steps so far" in text
    assert "mix : has no result.json" in text
    empty = write_run(tmp_path / "empty", ["mix"])
    (empty / "mix/metrics.jsonl").write_text("")
    (empty / "mix/result.json").unlink()
    assert "No job has a line" in make_page([empty])


@pytest.mark.parametrize("layers", [[], [0, 1, 2]], ids=["without layers", "with layers"])
def test_questions_that_are_not_covered_are_told(page_of, layers):
    content = evaluation()
    empty = {"num_questions": 40, "num_questions_covered": 0, "num_tokens": 0}
    content["routing"]["mix"] |= {"layers": layers, "specialisation": {}}
    content["routing"]["mix"]["tasks"] = {"arc_easy": empty, "piqa": empty}
    page = page_of(content)
    assert "0 of 80 questions, 0 tokens." in page
    assert "--no-cache" in page


def test_what_experts_tell_is_shown_by_layer(page):
    text = Checked(page).text
    assert "What the choice of an expert tells about the topic, by layer, bits" in text
    assert page.count('<td class="n">0.500</td>') == 6  # the mutual information of each layer
    assert page.count('<td class="h3">0.500</td>') == 12  # the mean, in two topics


def test_results_may_lack_an_accuracy_or_an_interval(page_of):
    results = {"base": {"a": {"accuracy": 0.5, "stderr": 0.1}, "wiki": {"num_examples": 3}}}
    page = page_of({"schema_version": 1, "results": results})
    assert '<td class="n">50.0</td>' in page
    Checked(page)


def test_a_run_is_given_once(run):
    with pytest.raises(ConfigError, match="different names, got lora, mix more than once"):
        make_page([run, run])


def test_a_sweeps_settings_are_columns_and_its_jobs_are_ranked(tmp_path):
    names = ["a-000-0.1-4", "a-001-0.01-4", "a-002-0.1-8"]
    run = write_run(tmp_path / "sweep", names)
    lines = ["name,rank,status,steps,train.learning_rate,adapter.rank,eval/loss"]
    for rank, (name, rate, size) in enumerate([(names[2], 0.1, 8), (names[0], 0.1, 4)], start=1):
        lines.append(f"{name},{rank},finished,40,{rate},{size},2.5")
    (run / "sweep.csv").write_text("\n".join(lines))
    page = Checked(make_page([run, write_run(tmp_path / "other", ["lora"])])).text
    head = "job rank train.learning_rate adapter.rank eval/loss status steps"
    rows = ["sweep/a-001-0.01-4 – – – 2.5000", "sweep/a-002-0.1-8 1 0.1 8 2.5000"]
    rows += ["sweep/a-000-0.1-4 2 0.1 4 2.5000", "other/lora – – – 2.5000"]
    places = [page.index(text) for text in (head, *rows)]
    assert places == sorted(places)


def test_a_summary_comes_first_and_long_tables_are_folded(run, tmp_path):
    content = evaluation(tasks=[f"task{n}" for n in range(21)])
    path = write_evaluation(tmp_path / "r.json", content)
    checked = Checked(make_page([run], [path], summary="\nbase  <33.9>\none    85.9\n"))
    places = [
        checked.text.index(text) for text in ("Summary", "<33.9>", "Results r.json", "Jobs job")
    ]
    assert places == sorted(places)
    for title in ("Results, with 95 % intervals", "Differences on the same rows"):
        assert f"{title}: 21 rows" in checked.text


def test_the_entropy_over_all_tasks_is_that_of_their_mean_probabilities():
    content = evaluation()["routing"]["mix"]
    count = len(content["layers"])
    one, other = ([[float(e == expert) for e in range(8)]] * count for expert in (0, 1))
    for task, rows in zip(content["tasks"].values(), (one, other), strict=True):
        task |= {"mean_probabilities": rows, "mean_entropy_bits": [0.0] * count}
    content["experts_by_layer"] = [8] * (count - 1) + [2]
    rows = lay_out("mix", content)["layers"]
    assert [row["figures"][1] for row in rows] == pytest.approx([1.0] * count)
    assert [len(row["load"]) for row in rows] == content["experts_by_layer"]
    assert [*lay_out("mix", content)["expert_names"]] == [*range(8)]  # in older files
    content["expert_names"] = ["law", "math"]
    assert lay_out("mix", content)["expert_names"] == ["law", "math"]


def test_the_verb_writes_one_file(run, tmp_path, capsys):
    evaluated = write_evaluation(tmp_path / "result.json")
    assert cli.main(["report", str(run), "--eval", str(evaluated)]) == 0
    assert capsys.readouterr().out == f"wrote {run / 'report.html'}\n"
    assert (run / "report.html").read_text().lstrip().startswith("<!doctype html>")
    other = tmp_path / "new" / "page.html"
    assert cli.main(["report", str(run), "--output", str(other)]) == 0
    assert [path.name for path in other.parent.iterdir()] == ["page.html"]


def test_evaluations_whose_files_have_one_name_are_all_shown(run, tmp_path):
    paths = [tmp_path / name / "eval.json" for name in "ab"]
    for path in paths:
        path.parent.mkdir()
        write_evaluation(path)
    checked = Checked(make_page([run], paths))
    assert all(str(path) in checked.text for path in paths)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{tmp}"], "RUN_DIR must be a directory that `loraloom train` wrote"),
        (["{run}", "--eval", "nowhere.json"], "nowhere.json can't be read: No such file"),
        (["{run}", "--output", "{tmp}/page.json"], "--output must end in .html"),
    ],
)
def test_bad_input_is_one_error_and_nothing_is_written(run, tmp_path, capsys, words, message):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert cli.main(["report", *[word.format(run=run, tmp=empty) for word in words]]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert list(empty.iterdir()) == []
