from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loraloom.data.tokenising import TokenPair
from loraloom.errors import ConfigError
from loraloom.eval.cache import ScoreCache, ScoreFile, default_cache_directory
from loraloom.eval.identity import computation_key
from loraloom.eval.protocol import iter_scores, score_questions
from tests.eval.scoring import question, scoring_host, some_questions

ADAPTERS = [None, "lora", "mixlora"]


def encoded(*continuations):
    return [TokenPair([1, 2], list(ids)) for ids in continuations]


@pytest.fixture
def file(tmp_path):
    return ScoreFile(tmp_path / "scores.jsonl", {"dtype": "float32"})


def test_what_is_added_is_found_again_to_the_bit(tmp_path, file):
    values = (-1.0 / 3, -1e-300)
    file.add([(encoded([3], [4, 5]), values)])
    again = ScoreFile(tmp_path / "scores.jsonl", {"dtype": "float32"})
    assert file.find(encoded([3], [4, 5])) == again.find(encoded([3], [4, 5])) == values


def test_a_question_is_known_by_all_its_tokens(file):
    file.add([(encoded([3], [4, 5]), (-1.0, -2.0))])
    for other in (encoded([3]), encoded([3], [4, 6]), encoded([3, 4], [5]), encoded([4, 5], [3])):
        assert file.find(other) is None


def test_the_first_line_says_what_the_scores_depend_on(tmp_path, file):
    first = (tmp_path / "scores.jsonl").read_text().splitlines()[0]
    assert json.loads(first) == {"key": {"dtype": "float32"}}


@pytest.mark.parametrize("lost", [1, 5, 40])
def test_a_torn_last_line_is_dropped_and_what_follows_it_is_kept(tmp_path, file, lost):
    path = tmp_path / "scores.jsonl"
    for token in (3, 4, 5):
        file.add([(encoded([token]), (-float(token),))])
    path.write_bytes(path.read_bytes()[:-lost])
    torn = ScoreFile(path, {})
    assert [torn.find(encoded([token])) for token in (3, 4)] == [(-3.0,), (-4.0,)]
    kept = torn.find(encoded([5]))
    assert kept == ((-5.0,) if lost == 1 else None)  # only the line break was lost
    torn.add([(encoded([6]), (-6.0,))])
    assert ScoreFile(path, {}).find(encoded([6])) == (-6.0,)


def test_a_changed_number_is_not_believed(tmp_path, file):
    path = tmp_path / "scores.jsonl"
    file.add([(encoded([3]), (-3.25,))])
    path.write_text(path.read_text().replace("-3.25", "-2.25"))
    assert ScoreFile(path, {}).find(encoded([3])) is None


def test_scores_that_are_not_finite_are_not_kept(file):
    file.add([(encoded([3]), (float("nan"),)), (encoded([4]), (-1.0,))])
    assert (file.find(encoded([3])), file.find(encoded([4]))) == (None, (-1.0,))


def test_processes_can_share_a_file(tmp_path):
    code = (
        "import sys; from pathlib import Path; from loraloom.eval.cache import _append, _create\n"
        "path, start = Path(sys.argv[1]), int(sys.argv[2])\n"
        "_create(path, {})\n"
        "for n in range(200): _append(path, [(f'{start + n}', (-float(start + n),))] * 20)\n"
    )
    path = tmp_path / "scores.jsonl"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(path), start], env=os.environ)
        for start in ("0", "1000")
    ]
    assert [process.wait() for process in processes] == [0, 0]
    lines = [line for line in path.read_text().splitlines() if line and "check" in line]
    assert len(lines) == 2 * 200 * 20
    assert len(ScoreFile(path, {})._scores) == 400


def test_a_directory_that_can_not_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"scores can't be kept in .*; give another --cache DIR"):
        ScoreCache(tmp_path / "file" / "cache", scoring_host(configs={}), [None])


def test_the_default_directory_follows_xdg(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_directory() == Path("/somewhere/loraloom/eval")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_directory() == Path.home() / ".cache" / "loraloom" / "eval"


@pytest.fixture
def calls(monkeypatch):
    """Rows of every forward."""
    from loraloom.models.host import Host

    seen, hidden = [], Host.hidden

    def counted(self, ids, *args, **options):
        seen.append(len(ids))
        return hidden(self, ids, *args, **options)

    monkeypatch.setattr(Host, "hidden", counted)
    return seen


def score(host, tokenizer, directory, adapters=ADAPTERS, questions=None, **options):
    cache = ScoreCache(directory, host, adapters)
    asked = some_questions() if questions is None else questions
    return score_questions(host, tokenizer, asked, adapters, cache=cache, **options), cache


def test_a_second_evaluation_computes_nothing_and_is_the_same(tiny_tokenizer, tmp_path, calls):
    host = scoring_host()
    first, cache = score(host, tiny_tokenizer, tmp_path)
    assert (cache.num_found, cache.num_added) == (0, 15)
    calls.clear()
    second, cache = score(scoring_host(), tiny_tokenizer, tmp_path)
    assert second == first == score_questions(host, tiny_tokenizer, some_questions(), ADAPTERS)
    assert (cache.num_found, cache.num_added) == (15, 0)


def test_only_the_adapters_that_are_missing_are_computed(tiny_tokenizer, tmp_path, calls):
    host = scoring_host()
    score(host, tiny_tokenizer, tmp_path, [None, "lora"], max_tokens_per_batch=1)
    rows = sum(calls) // 2
    calls.clear()
    score(host, tiny_tokenizer, tmp_path, max_tokens_per_batch=1)
    assert sum(calls) == rows


def test_an_interrupted_evaluation_goes_on_to_the_same_bits(tiny_tokenizer, tmp_path, calls):
    host = scoring_host(dtype=torch.bfloat16)
    asked = [question(f"Question {n}:" + " one" * n, ["A", "B"], index=n) for n in range(12)]
    unbroken = score_questions(host, tiny_tokenizer, asked, ADAPTERS, max_tokens_per_batch=256)
    num_batches = len(calls)
    calls.clear()
    cache = ScoreCache(tmp_path, host, ADAPTERS)
    batches = iter_scores(host, tiny_tokenizer, asked, ADAPTERS, 256, cache=cache)
    next(batches), next(batches)
    batches.close()
    resumed, _ = score(host, tiny_tokenizer, tmp_path, questions=asked, max_tokens_per_batch=256)
    assert resumed == unbroken
    assert len(calls) == num_batches > 3


@pytest.mark.parametrize("change", ["adapter", "base", "dtype", "attention", "window"])
def test_another_computation_is_not_taken_for_this_one(tiny_tokenizer, tmp_path, change):
    score(scoring_host(), tiny_tokenizer, tmp_path, ["lora"])
    host = scoring_host(
        dtype=torch.float32 if change == "dtype" else torch.float64,
        **(
            {"rope_parameters": {"rope_type": "default", "rope_theta": 99.0}}
            if change == "window"
            else {}
        ),
    )
    if change == "adapter":
        next(iter(host.adapters["lora"].parameters())).data.view(-1)[-1] += 1
    if change == "base":
        host.model.get_input_embeddings().weight.data.view(-1)[-1] += 1
    if change == "attention":
        host.model.set_attn_implementation("eager")
    _, cache = score(host, tiny_tokenizer, tmp_path, ["lora"])
    assert cache.num_found == 0


def test_names_and_neighbours_do_not_matter(tiny_tokenizer, tmp_path):
    score(scoring_host(), tiny_tokenizer, tmp_path, ["lora"])
    host = scoring_host()
    lora = host.adapters["lora"]
    host.remove("mixlora")
    host.adapters["other"] = lora
    _, cache = score(host, tiny_tokenizer, tmp_path, ["other"])
    assert (cache.num_found, cache.num_added) == (5, 0)


def test_a_file_may_be_deleted_at_any_time(tmp_path):
    file = ScoreFile(tmp_path / "scores.jsonl", {})
    (tmp_path / "scores.jsonl").unlink()
    file.sync()
    file.add([(encoded([3]), (-1.0,))])
    assert ScoreFile(tmp_path / "scores.jsonl", {}).find(encoded([3])) == (-1.0,)


def test_a_directory_may_be_deleted_at_any_time(tmp_path):
    (tmp_path / "cache").mkdir()
    file = ScoreFile(tmp_path / "cache" / "scores.jsonl", {})
    shutil.rmtree(tmp_path / "cache")
    file.sync()
    file.add([(encoded([3]), (-1.0,))])
    assert ScoreFile(tmp_path / "cache" / "scores.jsonl", {}).find(encoded([3])) == (-1.0,)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_the_order_of_weights_counts(name):
    host = scoring_host(configs={})
    weight = host.model.get_parameter(name)
    weight.data.copy_(torch.rand(weight.shape))
    before = computation_key(host)
    weight.data.copy_(weight.data.roll(1, 0))
    assert computation_key(host) != before
    weight.data.copy_(weight.data.roll(-1, 0))
    assert computation_key(host) == before
