from __future__ import annotations

import json
import os
import signal

import pytest
import yaml

import loraloom.training.run.watch as watch
from loraloom.errors import ConfigError
from loraloom.training.run.builder import JobBuilder
from loraloom.training.run.checkpoint import SnapshotStore
from loraloom.training.run.watch import WatchedDirectory, WatchOptions, prepare_watched
from tests.training.running import assert_same_files, interrupted
from tests.training.toy import toy_config, toy_engine


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch):
    """Look between any two steps, and wait for nothing."""
    monkeypatch.setattr(watch, "LOOK_S", 0.0)
    monkeypatch.setattr(watch, "PROGRESS_S", 0.0)


@pytest.fixture
def inbox(tmp_path):
    rows = [{"text": f"{word} and so on"} for word in ("one", "two", "three", "four")]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "inbox").mkdir()
    return tmp_path / "inbox"


def settings(**changes):
    return {
        "adapter": {"method": "lora", "rank": 2, "alpha": 4},
        "data": {"dataset": "rows.jsonl", "format": "text"},
        "train": {"max_steps": 3, "batch_size": 2, "max_length": 32, "learning_rate": 1e-3},
    } | changes


def drop(inbox, stem: str, **changes):
    path = inbox / f"{stem}.yaml"
    data = {"dataset": str(inbox.parent / "rows.jsonl"), "format": "text"}
    path.write_text(yaml.safe_dump(settings(data=data) | changes))
    return path


def state_of(path):
    return json.loads(path.with_name(f"{path.stem}.state.json").read_text())


def watched(tmp_path, inbox, *configs, engine=None, **options) -> WatchedDirectory:
    engine = engine or toy_engine(tmp_path / "out", configs)
    builder = JobBuilder(engine.host, engine._evaluation.tokenizer, engine._evaluation)
    options = {"exit_when_idle": True} | options
    return WatchedDirectory(WatchOptions(inbox, **options), engine, builder, lambda _: None)


def test_files_are_trained_and_their_states_tell_how_it_went(tmp_path, inbox):
    paths = [drop(inbox, "math"), drop(inbox, "other", name="law")]
    results = watched(tmp_path, inbox).run()
    assert [(result.job, result.steps) for result in results] == [("math", 3), ("law", 3)]
    state = state_of(paths[1])
    assert (state["file"], state["job"], state["state"]) == ("other.yaml", "law", "done")
    assert (state["step"], state["total_steps"], state["reason"]) == (3, 3, None)
    assert state["loss"] > 0
    assert state["queued_at"] <= state["started_at"] <= state["ended_at"] <= state["updated_at"]
    assert state["result"] == str(tmp_path / "out" / "law")


def test_a_file_that_comes_later_joins_the_jobs_that_train(tmp_path, inbox):
    directory = watched(tmp_path, inbox, toy_config("first", max_steps=20))
    engine, seen = directory._engine, set()
    step = engine.step

    def stepping():
        seen.add(tuple(engine.jobs))
        step()
        if engine.round == 2:
            drop(inbox, "late")

    engine.step = stepping
    results = directory.run()
    assert {result.job: result.steps for result in results} == {"first": 20, "late": 3}
    assert ("first", "late") in seen


FAULTS = [
    ("- 1", "must be a mapping of settings, got list"),
    ("adapter: {method: lora, rnk: 2}", "adapter: unknown key"),
    ("a: [", "broken.yaml"),
    (yaml.safe_dump(settings(data={"dataset": "gone.jsonl", "format": "text"})), "gone.jsonl"),
    (yaml.safe_dump(settings(name="well")), "job name must be new in this run, got 'well' again"),
]


@pytest.mark.parametrize(("text", "reason"), FAULTS, ids=["list", "key", "yaml", "data", "name"])
def test_a_faulty_file_fails_with_its_reason_and_disturbs_nothing(tmp_path, inbox, text, reason):
    drop(inbox, "a", name="well")
    path = inbox / "broken.yaml"
    path.write_text(text)
    directory = watched(tmp_path, inbox)
    (result,) = directory.run()
    assert (result.job, result.status) == ("well", "finished")
    state = state_of(path)
    assert state["state"] == "failed"
    assert reason in state["reason"]
    assert directory._engine.host.adapters == {}


def test_a_faulty_file_is_read_again_when_it_was_edited(tmp_path, inbox):
    path = inbox / "math.yaml"
    path.write_text("adapter: 3")
    directory = watched(tmp_path, inbox)
    directory.run()
    assert state_of(path)["state"] == "failed"
    drop(inbox, "math")
    os.utime(path, ns=(1, 1))
    (result,) = directory.run()
    assert result.job == "math"
    assert state_of(path)["state"] == "done"
    directory.run()
    assert state_of(path)["state"] == "done"


def test_a_job_that_fails_says_so(tmp_path, inbox):
    train = {"max_steps": 3, "learning_rate": 1e200, "optimizer": "sgd", "max_grad_norm": None}
    path = drop(inbox, "wild", train=train)
    (result,) = watched(tmp_path, inbox).run()
    assert state_of(path)["state"] == "failed"
    assert state_of(path)["reason"] == result.error


def test_a_file_is_not_read_while_it_still_changes(tmp_path, inbox):
    directory = watched(tmp_path, inbox)
    path = drop(inbox, "math")
    directory.look()
    assert state_of(path)["state"] == "queued"
    os.utime(path, ns=(1, 1))
    directory.look()
    assert list(directory._engine.jobs) == []
    directory.look()
    assert list(directory._engine.jobs) == ["math"]
    assert state_of(path)["state"] == "running"


def test_a_file_that_is_deleted_while_it_waits_is_forgotten(tmp_path, inbox):
    directory = watched(tmp_path, inbox)
    path = drop(inbox, "math")
    directory.look()
    path.unlink()
    directory.look()
    assert list(inbox.iterdir()) == []
    assert directory.is_idle


def test_deleting_the_file_of_a_job_that_trains_stops_it(tmp_path, inbox):
    paths = [drop(inbox, "a"), drop(inbox, "b")]
    directory = watched(tmp_path, inbox)
    step = directory._engine.step

    def stepping():
        step()
        if directory._engine.round == 1:
            paths[0].unlink()

    directory._engine.step = stepping
    results = {result.job: result for result in directory.run()}
    assert (results["a"].status, results["a"].steps) == ("stopped", 1)
    assert results["b"].status == "finished"
    state = state_of(paths[0])
    assert state["state"] == "stopped"
    assert "was deleted" in state["reason"]
    assert (tmp_path / "out/a/adapter_model.safetensors").exists()


def test_hidden_files_and_others_are_let_alone(tmp_path, inbox):
    for name in (".math.yaml", "notes.txt"):
        (inbox / name).write_text("half a file")
    assert watched(tmp_path, inbox).run() == []
    assert {path.name for path in inbox.iterdir()} == {".math.yaml", "notes.txt"}


def resumed_engine(tmp_path):
    snapshot, _ = SnapshotStore(tmp_path / "out/.checkpoints").newest()
    engine = toy_engine(tmp_path / "out", [])
    builder = JobBuilder(engine.host, engine._evaluation.tokenizer, engine._evaluation)
    for name, record in snapshot.jobs.items():
        if record.status == "running":
            config = toy_config(name).model_validate(record.settings)
            engine._enter(builder.build(config), joined_later=True)
    engine.load_state(snapshot)
    return engine


def test_sigterm_saves_and_says_that_jobs_wait(tmp_path, inbox):
    path = drop(inbox, "a")
    directory = watched(tmp_path, inbox)
    step = directory._engine.step

    def stepping():
        step()
        os.kill(os.getpid(), signal.SIGTERM)

    directory._engine.step = stepping
    with pytest.raises(SystemExit, match="143"):
        directory.run()
    assert state_of(path)["state"] == "queued"
    (result,) = watched(tmp_path, inbox, engine=resumed_engine(tmp_path)).run()
    assert (result.status, result.steps) == ("finished", 3)


@pytest.mark.parametrize("after_round", [1, 2])
def test_a_watch_that_was_interrupted_goes_on_to_the_same_weights(tmp_path, inbox, after_round):
    paths = [drop(inbox, "a"), drop(inbox, "b", name="c")]
    watched(tmp_path / "unbroken", inbox).run()
    for path in inbox.glob("*.state.json"):
        path.unlink()
    directory = watched(tmp_path, inbox)
    engine = directory._engine
    step = engine.step

    def stepping():
        step()
        if engine.round == after_round:
            engine._interruption.requested = True

    engine.step = stepping
    with pytest.raises(KeyboardInterrupt):
        directory.run()
    state = state_of(paths[0])
    assert (state["state"], state["step"]) == ("queued", after_round)
    assert "--resume" in state["reason"]
    results = watched(tmp_path, inbox, engine=resumed_engine(tmp_path)).run()
    assert {result.job: result.steps for result in results} == {"a": 3, "c": 3}
    assert [state_of(path)["state"] for path in paths] == ["done", "done"]
    assert_same_files(tmp_path / "out", tmp_path / "unbroken/out", ["a", "c"])


def test_files_that_are_done_stay_done_when_the_run_goes_on(tmp_path, inbox):
    path = drop(inbox, "a")
    watched(tmp_path, inbox).run()
    before = state_of(path)
    (result,) = watched(tmp_path, inbox, engine=resumed_engine(tmp_path)).run()
    assert result.job == "a"
    assert state_of(path) == before


def test_a_file_deleted_while_nothing_ran_stops_its_job(tmp_path, inbox):
    path = drop(inbox, "a")
    directory = watched(tmp_path, inbox)
    directory.look()
    directory.look()
    interrupted(directory._engine, after_round=1)
    path.unlink()
    (result,) = watched(tmp_path, inbox, engine=resumed_engine(tmp_path)).run()
    assert (result.status, result.steps) == ("stopped", 1)
    assert state_of(path)["state"] == "stopped"


def test_a_job_that_was_lost_with_its_process_waits_again(tmp_path, inbox):
    path = drop(inbox, "a")
    directory = watched(tmp_path, inbox)
    directory.look()
    directory.look()
    assert state_of(path)["state"] == "running"
    (result,) = watched(tmp_path, inbox).run()
    assert result.status == "finished"
    assert state_of(path)["state"] == "done"


def test_a_state_file_that_is_not_ours_counts_for_nothing(tmp_path, inbox):
    path = drop(inbox, "a")
    path.with_name("a.state.json").write_text("[1]")
    watched(tmp_path, inbox).run()
    assert state_of(path)["state"] == "done"


def test_state_files_that_can_not_be_written_stop_nothing(tmp_path, inbox, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    drop(inbox, "a")
    monkeypatch.setattr(watch, "write_json", full)
    (result,) = watched(tmp_path, inbox).run()
    assert result.status == "finished"


def test_a_fault_of_writing_is_told_once(tmp_path, inbox, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    path, told = drop(inbox, "a"), []
    directory = watched(tmp_path, inbox)
    directory._say = told.append
    monkeypatch.setattr(watch, "write_json", full)
    directory.run()
    (warning,) = [text for text in told if text.startswith("warning")]
    assert str(path) in warning
    assert "No space left" in warning


def test_a_directory_that_can_not_be_read_for_a_while_stops_no_job(tmp_path, inbox):
    drop(inbox, "a")
    directory = watched(tmp_path, inbox)
    step, engine, away = directory._engine.step, directory._engine, tmp_path / "away"

    def stepping():
        step()
        if engine.round == 1:
            inbox.rename(away)
        if engine.round == 2:
            away.rename(inbox)

    engine.step = stepping
    (result,) = directory.run()
    assert (result.status, result.steps) == ("finished", 3)


def test_only_files_count(tmp_path, inbox):
    (inbox / "directory.yaml").mkdir()
    (inbox / "loop.yaml").symlink_to("loop.yaml")
    os.mkfifo(inbox / "pipe.yaml")
    assert watched(tmp_path, inbox).run() == []


def test_files_of_an_earlier_run_have_no_part_in_jobs_of_their_name(tmp_path, inbox):
    old = drop(inbox, "old", name="math")
    watched(tmp_path / "earlier", inbox).run()
    before = state_of(old)
    directory = watched(tmp_path, inbox, toy_config("math", max_steps=5))
    step = directory._engine.step

    def stepping():
        step()
        if directory._engine.round == 1:
            assert state_of(old) == before
            old.unlink()

    directory._engine.step = stepping
    (result,) = directory.run()
    assert (result.status, result.steps) == ("finished", 5)


def test_a_state_file_can_not_name_a_file_elsewhere(tmp_path, inbox):
    victim = tmp_path / "victim.state.json"
    victim.write_text("{}")
    text = json.dumps({"file": "../victim.yaml", "state": "queued", "updated_at": ""})
    (inbox / "a.state.json").write_text(text)
    watched(tmp_path, inbox).run()
    assert victim.exists()


def test_a_directory_that_can_not_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--watch must name a directory"):
        prepare_watched(tmp_path / "file")
