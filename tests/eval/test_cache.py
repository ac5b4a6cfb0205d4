from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch

from loraloom.data.tokens import TokenPair
from loraloom.errors import ConfigError
from loraloom.eval.cache import FILE_NAME, ScoreCache, default_cache_directory
from loraloom.eval.provenance import computation_key
from loraloom.eval.score import Scorer, score_questions
from tests.eval.scoring import question, scoring_host, some_questions

ADAPTERS = [None, "lora", "mixlora"]


def encoded(*continuations):
    return [TokenPair([1, 2], list(ids)) for ids in continuations]


@pytest.fixture(scope="module")
def base():
    return scoring_host(configs={})


@pytest.fixture
def reopen(tmp_path, base):
    """Open the cache of the base model."""
    return lambda: ScoreCache(tmp_path, base, [None])


def keep(cache, *tokens):
    """Keep a score of each token."""
    cache.add([(None, encoded([token]), (-float(token),)) for token in tokens])


def kept(cache, *tokens):
    """Those that are known."""
    return [token for token in tokens if cache.find(None, encoded([token])) == (-float(token),)]


def test_what_is_added_is_found_again_to_the_bit(reopen):
    values = (-1.0 / 3, -1e-300)
    reopen().add([(None, encoded([3], [4, 5]), values)])
    assert reopen().find(None, encoded([3], [4, 5])) == values


def test_a_question_is_known_by_all_its_tokens(reopen):
    reopen().add([(None, encoded([3], [4, 5]), (-1.0, -2.0))])
    for other in (encoded([3]), encoded([3], [4, 6]), encoded([3, 4], [5]), encoded([4, 5], [3])):
        assert reopen().find(None, other) is None


def test_the_file_says_what_its_scores_depend_on(tmp_path, reopen, base):
    reopen()
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as file:
        ((description,),) = file.execute("SELECT description FROM computations")
    assert json.loads(description) == {**computation_key(base), "adapter": None}


def test_scores_that_are_not_finite_are_not_kept(reopen):
    reopen().add([(None, encoded([3]), (float("nan"),)), (None, encoded([4]), (-4.0,))])
    assert kept(reopen(), 3, 4) == [4]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:8192] + b"\xff" * 8192 + content[16384:],
        lambda content: content.replace(b"[-1999.0]", b"[-1?99.0]"),
        lambda content: b"x" * len(content),
        lambda _: b"junk",
    ],
    ids=["cut short", "overwritten", "one score", "no database", "too short"],
)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, reopen, change):
    path = tmp_path / FILE_NAME
    keep(reopen(), *range(2000))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ConfigError, match=f"delete {FILE_NAME} there if it is damaged"):
        reopen()
    path.unlink()
    keep(reopen(), 5)
    assert kept(reopen(), 4, 5) == [5]


def test_a_file_that_is_damaged_meanwhile_ends_no_evaluation(tmp_path, reopen):
    cache = reopen()
    keep(cache, 4)
    (tmp_path / FILE_NAME).write_bytes(b"junk")
    keep(cache, 5)
    assert kept(cache, 4, 5) == [4, 5]
    assert cache.num_added == 1
    assert "file is not a database; delete scores.sqlite3 there" in cache.fault


@pytest.mark.slow
def test_processes_can_share_a_file(tmp_path, reopen, base):
    code = (
        "import sys; from pathlib import Path; from loraloom.eval import cache\n"
        "path, start = Path(sys.argv[1]), int(sys.argv[2])\n"
        "insert = 'INSERT INTO scores VALUES (?, ?, ?)'\n"
        "for n in range(start, start + 200):\n"
        "    rows = [('a', f'{n}.{part}', '[-1.0]') for part in range(20)]\n"
        "    cache._transact(path, lambda file: file.executemany(insert, rows))\n"
    )
    path = tmp_path / FILE_NAME
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(path), start], env=os.environ)
        for start in ("0", "1000")
    ]
    assert [process.wait() for process in processes] == [0, 0]
    with closing(sqlite3.connect(path)) as file:
        ((count,),) = file.execute("SELECT count(*) FROM scores")
    assert count == 2 * 200 * 20


def test_a_kill_leaves_what_was_kept(tmp_path, reopen):
    code = (
        "import os, signal, sys; from pathlib import Path; from loraloom.eval import cache\n"
        "path = Path(sys.argv[1]); insert = 'INSERT INTO scores VALUES (?, ?, ?)'\n"
        "cache._transact(path, lambda file: file.execute(insert, ('a', '1', '[-1.0]')))\n"
        "def die(file):\n"
        "    file.execute(insert, ('a', '2', '[-1.0]'))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "cache._transact(path, die)\n"
    )
    path = tmp_path / FILE_NAME
    killed = subprocess.run([sys.executable, "-c", code, str(path)], env=os.environ)
    assert killed.returncode == -signal.SIGKILL
    keep(reopen(), 5)
    with closing(sqlite3.connect(path)) as file:
        rows = file.execute("SELECT question FROM scores WHERE computation = 'a'").fetchall()
    assert rows == [("1",)]
    assert kept(reopen(), 5) == [5]


def test_a_directory_that_can_not_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"scores can't be kept in .*, or give another --cache DIR"
    ):
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


def score(host, tokenizer, directory, adapters=ADAPTERS, questions=None, max_tokens=None, **rest):
    cache = ScoreCache(directory, host, adapters)
    asked = some_questions() if questions is None else questions
    return score_questions(
        Scorer(host, adapters, max_tokens, cache), tokenizer, asked, **rest
    ), cache


def test_a_second_evaluation_computes_nothing_and_is_the_same(tiny_tokenizer, tmp_path, calls):
    host = scoring_host()
    first, cache = score(host, tiny_tokenizer, tmp_path)
    assert (cache.num_found, cache.num_added) == (0, 15)
    calls.clear()
    second, cache = score(scoring_host(), tiny_tokenizer, tmp_path)
    assert (
        second == first == score_questions(Scorer(host, ADAPTERS), tiny_tokenizer, some_questions())
    )
    assert (cache.num_found, cache.num_added) == (15, 0)


def test_only_the_adapters_that_are_missing_are_computed(tiny_tokenizer, tmp_path, calls):
    host = scoring_host()
    score(host, tiny_tokenizer, tmp_path, [None, "lora"], max_tokens=1)
    rows = sum(calls) // 2
    calls.clear()
    score(host, tiny_tokenizer, tmp_path, max_tokens=1)
    assert sum(calls) == rows


def test_an_interrupted_evaluation_goes_on_to_the_same_bits(tiny_tokenizer, tmp_path, calls):
    host = scoring_host(dtype=torch.bfloat16)
    asked = [question(f"Question {n}:" + " one" * n, ["A", "B"], index=n) for n in range(12)]
    unbroken = score_questions(Scorer(host, ADAPTERS, 256), tiny_tokenizer, asked)
    num_batches = len(calls)
    calls.clear()

    def stop(places):
        if len(calls) == 2:
            raise KeyboardInterrupt

    options = {"questions": asked, "max_tokens": 256}
    with pytest.raises(KeyboardInterrupt):
        score(host, tiny_tokenizer, tmp_path, on_progress=stop, **options)
    resumed, _ = score(host, tiny_tokenizer, tmp_path, **options)
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


@pytest.mark.parametrize("others", [False, True])
def test_the_file_may_be_deleted_at_any_time(tmp_path, reopen, others):
    cache = reopen()
    keep(cache, 4)
    (tmp_path / FILE_NAME).unlink()
    if others:
        (tmp_path / f"{FILE_NAME}-wal").write_bytes(b"stale")
    keep(cache, 5)
    assert kept(reopen(), 4, 5) == [5]


def test_the_directory_may_be_deleted_at_any_time(tmp_path, base):
    cache = ScoreCache(tmp_path / "cache", base, [None])
    shutil.rmtree(tmp_path / "cache")
    keep(cache, 5)
    assert kept(ScoreCache(tmp_path / "cache", base, [None]), 5) == [5]


def test_files_of_earlier_versions_are_left_alone(tmp_path, reopen):
    (tmp_path / "0123.jsonl").write_text('{"key": {}}\n')
    keep(reopen(), 5)
    assert (tmp_path / "0123.jsonl").read_text() == '{"key": {}}\n'


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
