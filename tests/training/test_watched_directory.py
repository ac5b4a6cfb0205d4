import json
import os
import signal
from pathlib import Path

import pytest
import yaml

import loraloom.training.watched_directory as inbox_module
from loraloom.errors import ConfigError
from loraloom.training.checkpoints import CheckpointStore
from loraloom.training.run import train
from loraloom.training.watched_directory import WatchOptions, lock_watched
from tests.generation.saved import write_rows
from tests.training.running import Spoken, assert_same_files, pressing
from tests.training.toy import toy_host, toy_tokenizer


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch):
    """Look between any two steps, and wait for nothing."""
    monkeypatch.setattr(inbox_module, "LOOK_S", 0.0)


@pytest.fixture
def inbox(tmp_path):
    words = ("one", "two", "three", "four")
    write_rows(tmp_path / "rows.jsonl", *({"text": f"{word} and so on"} for word in words))
    (tmp_path / "inbox").mkdir()
    return tmp_path / "inbox"


def settings(inbox, max_steps=3, **changes):
    return {
        "adapter": {"method": "lora", "rank": 2, "alpha": 4},
        "data": {"dataset": str(inbox.parent / "rows.jsonl"), "format": "text"},
        "train": {"max_steps": max_steps, "batch_size": 2, "max_length": 32},
    } | changes


def drop(inbox, stem: str, **changes):
    path = inbox / f"{stem}.yaml"
    path.write_text(yaml.safe_dump(settings(inbox, **changes)))
    return path


def state_of(path):
    return json.loads(path.with_name(f"{path.stem}.state.json").read_text())


def watch(directory, inbox, *jobs, after_step=lambda engine: None, resume=False, waits=False):
    """Train jobs, and those in the inbox, on a new tiny model; to the end unless it `waits`."""
    spoken = Spoken()
    results = train(
        {"base_model": "toy", "output_dir": str(directory / "out"), "jobs": jobs},
        base=(toy_host(), toy_tokenizer()),
        watch=WatchOptions(inbox, exit_when_idle=not waits),
        between_steps=lambda engine, _: after_step(engine),
        progress=spoken,
        resume=resume,
    )
    return {result.job: (result.status, result.steps) for result in results}, spoken.messages


DONE = ("finished", 3)


def test_files_are_trained_and_their_states_tell_how_it_went(tmp_path, inbox):
    paths = [drop(inbox, "math"), drop(inbox, "other", name="law")]
    assert watch(tmp_path, inbox)[0] == {"math": DONE, "law": DONE}
    state = {"state": "done", "job": "law", "reason": None, "step": 3}
    assert state_of(paths[1]) == state | {"result": str(tmp_path / "out" / "law")}


def test_a_file_that_comes_later_joins_once_it_no_longer_changes(tmp_path, inbox):
    joined = []

    def write(engine):
        joined.append("late" in engine.jobs)
        if 1 <= engine.round <= 3:
            drop(inbox, "late", seed=10**engine.round)  # of another length each time

    first = settings(inbox, name="first", max_steps=8)
    results, _ = watch(tmp_path, inbox, first, after_step=write)
    assert results == {"first": ("finished", 8), "late": DONE}
    assert joined[:6] == [False] * 5 + [True]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- 1", "must be a mapping of settings, got list"),
        ("adapter: {method: lora, rnk: 2}", "adapter: unknown key"),
        ("{data: {dataset: gone.jsonl, format: text}}", "gone.jsonl"),
        ("{name: well}", "job name must be new in this run, got 'well' again"),
    ],
    ids=["list", "key", "data", "name"],
)
def test_a_faulty_file_fails_with_its_reason_and_disturbs_nothing(tmp_path, inbox, text, reason):
    drop(inbox, "a", name="well")
    path = inbox / "broken.yaml"
    changes = yaml.safe_load(text)
    is_whole = isinstance(changes, dict) and "adapter" not in changes
    path.write_text(yaml.safe_dump(settings(inbox) | changes) if is_whole else text)
    assert watch(tmp_path, inbox)[0] == {"well": DONE}
    assert state_of(path)["state"] == "failed"
    assert reason in state_of(path)["reason"]


def test_a_faulty_file_is_read_again_when_it_was_edited(tmp_path, inbox):
    path = inbox / "math.yaml"
    path.write_text("adapter: 3")

    def edit(engine):
        if engine.round == 3:
            assert state_of(path)["state"] == "failed"
            drop(inbox, "math")

    first = settings(inbox, name="first", max_steps=6)
    assert watch(tmp_path, inbox, first, after_step=edit)[0]["math"] == DONE
    assert state_of(path)["state"] == "done"


def test_deleting_a_file_stops_its_job_or_forgets_it(tmp_path, inbox):
    paths = [drop(inbox, "a"), drop(inbox, "b")]

    def delete(engine):
        if engine.round == 1:
            paths[0].unlink()
            drop(inbox, "waiting")
        if engine.round == 2:
            (inbox / "waiting.yaml").unlink()

    results, _ = watch(tmp_path, inbox, after_step=delete)
    assert results == {"a": ("stopped", 2), "b": DONE}  # two looks missed it
    assert state_of(paths[0])["state"] == "stopped"
    assert "was deleted" in state_of(paths[0])["reason"]
    assert (tmp_path / "out/a/adapter_model.safetensors").exists()


def test_a_file_that_is_renamed_and_written_again_stops_no_job(tmp_path, inbox):
    """As some editors save it; or a directory that is away for a while."""
    path = drop(inbox, "a", max_steps=6)
    text = path.read_text()

    def save(engine):
        if engine.round == 1:
            path.rename(inbox / "a.yaml~")
        if engine.round == 2:
            path.write_text(text)
        if engine.round == 3:
            inbox.rename(tmp_path / "away")
        if engine.round == 5:
            (tmp_path / "away").rename(inbox)

    assert watch(tmp_path, inbox, after_step=save)[0] == {"a": ("finished", 6)}


def test_only_files_count(tmp_path, inbox, monkeypatch):
    (inbox / "directory.yaml").mkdir()
    os.mkfifo(inbox / "pipe.yaml")
    for name in (".math.yaml", "notes.txt"):
        (inbox / name).write_text("half a file")
    drop(inbox, "a")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert watch(tmp_path, Path("~/inbox"))[0] == {"a": DONE}


def test_a_watch_that_was_interrupted_goes_on_to_the_same_weights(tmp_path, inbox):
    paths = [drop(inbox, "a"), drop(inbox, "b", name="c")]
    watch(tmp_path / "unbroken", inbox)
    for path in inbox.glob("*.state.json"):
        path.unlink()
    with pytest.raises(SystemExit, match="143"):
        watch(tmp_path, inbox, after_step=pressing(2, signal.SIGTERM))
    assert state_of(paths[0])["state"] == "running"
    assert watch(tmp_path, inbox, resume=True)[0] == {"a": DONE, "c": DONE}
    before = [state_of(path) for path in paths]
    assert [state["state"] for state in before] == ["done", "done"]
    assert_same_files(tmp_path / "out", tmp_path / "unbroken/out", ["a", "c"])
    watch(tmp_path, inbox, resume=True)
    assert [state_of(path) for path in paths] == before


def test_a_file_deleted_while_nothing_ran_stops_its_job(tmp_path, inbox):
    path = drop(inbox, "a")
    with pytest.raises(KeyboardInterrupt):
        watch(tmp_path, inbox, after_step=pressing(1))
    path.unlink()
    assert watch(tmp_path, inbox, resume=True)[0] == {"a": ("stopped", 1)}
    assert state_of(path)["state"] == "stopped"


@pytest.mark.parametrize(
    "text",
    ['{"state": "running", "job": "a"}', "[1]", '{"job": [], "state": "running"}'],
    ids=["lost", "list", "types"],
)
def test_what_a_run_that_died_or_somebody_else_left_counts_for_nothing(tmp_path, inbox, text):
    path = drop(inbox, "a")
    path.with_name("a.state.json").write_text(text)
    watch(tmp_path, inbox)
    assert state_of(path)["state"] == "done"


def test_files_of_an_earlier_run_have_no_part_in_jobs_of_their_name(tmp_path, inbox):
    old = drop(inbox, "old", name="math")
    watch(tmp_path / "earlier", inbox)
    before, seen = state_of(old), []

    def delete(engine):
        if engine.round == 1:
            seen.append(state_of(old))
            old.unlink()

    math = settings(inbox, name="math", max_steps=5)
    assert watch(tmp_path, inbox, math, after_step=delete)[0] == {"math": ("finished", 5)}
    assert seen == [before]


def test_a_fault_of_writing_stops_nothing(tmp_path, inbox, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    path = drop(inbox, "a")
    monkeypatch.setattr(inbox_module, "write_json", full)
    results, messages = watch(tmp_path, inbox)
    assert results == {"a": DONE}
    warnings = [text for text in messages if text.startswith("warning")]
    assert all(str(path) in text and "No space left" in text for text in warnings)
    assert len(warnings) == 2


def test_jobs_are_waited_for_until_the_run_is_interrupted(tmp_path, inbox, monkeypatch):
    """A file comes while there is nothing to do; Ctrl-C comes when its job is done."""
    waits, path = [], inbox / "late.yaml"

    def wait(_):
        waits.append(path.exists())
        if len(waits) == 2:
            drop(inbox, "late")
        if len(waits) > 4 and state_of(path)["state"] == "done":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(inbox_module.time, "sleep", wait)
    with pytest.raises(KeyboardInterrupt):
        watch(tmp_path, inbox, waits=True)
    assert waits[:2] == [False, False]
    checkpoint, _ = CheckpointStore(tmp_path / "out/.checkpoints").newest()
    assert checkpoint.jobs["late"].result is not None


def test_a_directory_of_job_files_has_one_trainer(inbox):
    with (
        lock_watched(inbox),
        pytest.raises(ConfigError, match=r"no other run watches, got .*not be acquired"),
        lock_watched(inbox),
    ):
        pass
    (inbox / "file").write_text("")
    with pytest.raises(ConfigError, match="must name a writable"), lock_watched(inbox / "file"):
        pass
