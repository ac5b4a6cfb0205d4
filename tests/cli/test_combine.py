import json

import pytest
import torch

import loraloom
from loraloom import LoraConfig, PromptForm, RoutedConfig, fit_router
from loraloom.cli.main import main
from loraloom.cli.options import tell_unknown_prompts
from tests.generation.saved import save_tiny, write_rows
from tests.tiny import randomise


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = save_tiny(tmp_path_factory.mktemp("saved"))
    model, tokenizer = loraloom.load_base_model(str(directory / "base"))
    host = loraloom.attach(model)
    for seed, name in enumerate(("law", "math")):
        randomise(host.add(name, LoraConfig(rank=2, alpha=4), seed=seed), seed)
        host.save(name, directory / name)
    host.add("one", RoutedConfig(experts={"law": "law", "math": "math"}))
    prompts = {"law": ["the court", "a court"], "math": ["one two", "two one"]}
    fit_router(host, tokenizer, "one", prompts)
    host.save("one", directory / "one")
    return directory


def combine(saved, output, *options):
    base = ["--base-model", str(saved / "base"), "--device", "cpu"]
    adapters = [f"--adapter={name}={saved / name}" for name in ("law", "math")]
    return main(["combine", str(output), *base, *adapters, *options])


def test_adapters_become_one_that_is_asked(saved, tmp_path, capsys):
    one = tmp_path / "one"
    prompts = [f"--prompts={name}=skills@{n}of2" for n, name in enumerate(("law", "math"), start=1)]
    assert combine(saved, one, *prompts, "--limit", "10", "--num-layers-read", "1") == 0
    said = capsys.readouterr().out
    assert "of the held-out prompts" in said
    assert "law, math combined by prompt" in said
    assert combine(saved, one, *prompts, "--limit", "10") == 2
    assert "overwrite" in capsys.readouterr().err
    result = tmp_path / "result.json"
    words = ["--base-model", str(saved / "base"), f"--adapter=one={one}", f"--output={result}"]
    assert main(["eval", *words, "--task", "skills@1of2", "--limit", "6", "--device", "cpu"]) == 0
    routing = json.loads(result.read_text())["routing"]["one"]
    assert routing["layers"] == ["0.prompt"]
    assert sum(routing["tasks"]["skills@1of2"]["load"][0]) == pytest.approx(1, abs=1e-5)
    assert routing["warnings"] == []
    assert main(["inspect", str(one)]) == 0


def test_routers_by_token_are_trained_in_a_run_and_the_experts_stay(saved, tmp_path):
    sources = {name: str(saved / name) for name in ("law", "math")}

    def train(output, **routers):
        settings = {
            "data": {"task": "skills@2"},
            "train": {"max_steps": 2, "batch_size": 4, "max_length": 128},
        }
        jobs = [
            {"name": name, "adapter": {"method": "routed", "experts": sources, **router}} | settings
            for name, router in routers.items()
        ]
        run = {"base_model": str(saved / "base"), "output_dir": str(tmp_path / output)}
        return loraloom.train({**run, "device": "cpu", "jobs": jobs})

    token = {"router": "token"}
    assert train("run", token=token)[0].num_parameters == 2 * (2 * 6 * 32 + 2 * 48)
    host = loraloom.attach(loraloom.load_base_model(str(saved / "base"))[0])
    host.load("token", tmp_path / "run" / "token")
    host.load("law", saved / "law")
    held = host.adapter("token/law").tensors()
    assert all(torch.equal(held[n], t) for n, t in host.adapters["law"].tensors().items())
    stale = token | {"experts": sources | {"law": "token"}}
    with pytest.raises(loraloom.ConfigError, match=r"adapter\.experts must not be in what the run"):
        train("x", token=token, other=stale)
    with pytest.raises(loraloom.AdapterError, match="'arrow' is not trained"):
        train("other", arrow={"router": "arrow"})


def test_rows_of_adapters_that_record_no_form_are_told_by_their_columns(saved, tmp_path, capsys):
    rows = {
        "law": [{"prompt": f"the court {n}", "completion": "yes"} for n in range(8)],
        "math": [{"instruction": f"one {n}", "output": "two " * 600} for n in range(8)],
    }
    files = {name: write_rows(tmp_path / f"{name}.jsonl", *of) for name, of in rows.items()}
    prompts = [f"--prompts={name}={file}" for name, file in files.items()]
    assert combine(saved, tmp_path / "one", *prompts) == 0
    assert "of the held-out prompts" in capsys.readouterr().out
    assert combine(saved, tmp_path / "two", *prompts, "--scoring", "text") == 2
    assert "--scoring requires a task in --prompts" in capsys.readouterr().err
    choices = [{"question": "a?", "choices": ["b", "c"], "answer": 0}] * 3
    file = write_rows(tmp_path / "choices.jsonl", *choices)
    assert combine(saved, tmp_path / "two", prompts[0], f"--prompts=math={file}") == 2
    assert "Name a task" in capsys.readouterr().err
    task = tmp_path / "choices.yaml"
    task.write_text(f"""
data: {{files: {{train: {file}}}}}
template: "Question: {{{{ question }}}}\\nAnswer:"
choices: choices
answer: answer
answer_is: index
""")
    assert combine(saved, tmp_path / "two", prompts[0], f"--prompts=math={task}") == 0


@pytest.mark.parametrize("by", ["arrow", "cat"])
def test_other_ways_need_no_prompts(saved, tmp_path, capsys, by):
    more = [f"--adapter=combined={saved / 'law'}", "--by", by]
    more += [] if by == "arrow" else ["--weight", "law=0.5"]
    assert combine(saved, tmp_path / "one", *more) == 0
    assert f"by {by}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--prompts law=DATA is missing"),
        ("--prompts law=skills --prompts law=boolq", "--prompts must name each adapter once"),
        ("--prompts law=skills --prompts math=x.jsonl", "x.jsonl"),
        ("--prompts x=skills", "--prompts must be NAME=VALUE, where NAME is one of law, math"),
        ("--by cat --weight law=x", "--weight must be NAME=NUMBER"),
        ("--by cat --top-k 2", "--top-k requires --by prompt or arrow"),
        ("--by arrow --weight law=2", "--weight requires --by cat"),
        ("--by cat --prompts law=skills", "--prompts requires --by prompt"),
        ("--by arrow --limit 5", "--limit requires --by prompt"),
        ("--by cat --scoring text", "--scoring requires --by prompt"),
        ("--by cat --adapter law:0.5+math", "--adapter must be NAME=PATH here, got law:0.5+math;"),
    ],
)
def test_options_that_dont_fit_are_an_error_of_one_line(saved, tmp_path, capsys, words, message):
    assert combine(saved, tmp_path / "one", *words.split()) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "one").exists()


def test_an_expert_goes_wherever_an_adapters_name_does(saved, tmp_path, capsys, monkeypatch):
    base = ["--base-model", str(saved / "base"), "--device", "cpu"]
    one, law = f"--adapter=one={saved / 'one'}", f"--adapter=law={saved / 'law'}"
    ask = ["generate", *base, one, "--max-new-tokens", "6"]
    assert main([*ask, law, "--prompt", "a", "--no-base", "--adapter=one/law:1+one/math:0"]) == 0
    alike = capsys.readouterr().out.split("[law]\n")[1].split("[one/law:1+one/math:0]\n")
    names = ["one/law", ["one/law", 1], "one/law:1", "one/law+law:0"]
    rows = [{"prompt": "a", "adapter": name} for name in names]
    assert main([*ask, law, "--input", write_rows(tmp_path / "in.jsonl", *rows)]) == 0
    written = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["completion"] + "\n" for row in written} == {*alike}
    for name, message in [("two/law", "Hub ID as --adapter NAME=PATH"), ("one/x", "(law, math)")]:
        assert main([*ask, "--prompt", "a", "--adapter", name]) == 2
        assert message in capsys.readouterr().err
    words = ["--task", "skills@1of2", "--limit", "3", "--compare", "one:one/law", "--no-cache"]
    assert main(["eval", *base, one, "--adapter", "one/law", *words]) == 0
    said = capsys.readouterr().out
    assert "between one and one/law" in said or "one beats one/law" in said
    lines = iter(["/adapter one/math", "/adapter one/x", "/adapter one", "the court", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: print(prompt) or next(lines))
    assert main(["chat", *base, one, "--adapter", "one/law", "--max-new-tokens", "4"]) == 0
    output = capsys.readouterr().out
    assert output.startswith(
        "models: base, one, one/law; /help for commands\none/law> \none/math> "
    )
    assert "error: 'one' has no expert 'x'; choose one of its experts (law, math)" in output
    assert "[one, law]" in output


def test_forms_are_unknown_where_no_expert_has_one(saved, capsys):
    model, tokenizer = loraloom.load_base_model(str(saved / "base"))
    host, tokenizer.chat_template = loraloom.attach(model), "x"
    host.load("one", saved / "one")
    tell_unknown_prompts(host, tokenizer)
    assert "note: the files of one do not" in capsys.readouterr().err
    host.adapter("one/law").prompt = PromptForm(format="chat")
    tell_unknown_prompts(host, tokenizer)
    assert capsys.readouterr().err == ""
    host.adapter("one").prompt_router = None  # of a router by token, whose experts' forms differ
    tell_unknown_prompts(host, tokenizer)
    assert "note: the files of one do not" in capsys.readouterr().err


def test_rows_tell_whom_a_router_chose(saved, tmp_path):
    rows = [{"prompt": "the court", "adapter": name} for name in ("one", "one/law", "one/math")]
    path, output = write_rows(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    words = ["--base-model", str(saved / "base"), f"--adapter=one={saved / 'one'}"]
    words += ["--device", "cpu", "--max-new-tokens", "8"]
    words = ["generate", *words, "--input", path, "--output", str(output)]
    assert main(words) == 0
    whole = output.read_text()
    chosen, of_law, of_math = map(json.loads, whole.splitlines())
    assert chosen["completion"] == of_law["completion"] != of_math["completion"]
    assert (chosen["chosen"]["adapter"], len(chosen["chosen"]["probabilities"])) == ("law", 2)
    output.write_text(whole.splitlines(keepends=True)[0])
    assert (main([*words, "--resume"]), output.read_text()) == (0, whole)
