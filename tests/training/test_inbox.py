from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import yaml

import loraloom.training.inbox as inbox_module
from loraloom.errors import ConfigError
from loraloom.training.builder import Evaluation, JobBuilder
from loraloom.training.engine import Engine
from loraloom.training.inbox import (
    Inbox,
    WatchOptions,
    sole_trainer,
)
from loraloom.training.parallel import Lead
from loraloom.training.settings import JobConfig
from loraloom.training.store import CheckpointStore, RunDirectory
from tests.training.running import Spoken, assert_same_files
from tests.training.toy import add_job, toy_config, toy_host, toy_tokenizer


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch):
    """Look between any two steps, and wait for nothing."""
    monkeypatch.setattr(inbox_module, "LOOK_S", 0.0)
    monkeypatch.setattr(inbox_module, "PROGRESS_S", 0.0)


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


class Watched:
    """An engine with an inbox, on a new tiny model.

    Args:
        tmp_path: Results go to `out` in it, on from its newest snapshot if asked for.
        inbox: Directory of job files.
        configs: Jobs of the run file.
        after_step: Called with the engine after each round.
        options: Of the watch.
    """

    def __init__(
        self, tmp_path, inbox, *configs, resume=False, after_step=lambda engine: None, **options
    ):
        host, self.spoken = toy_host(), Spoken()
        directory = RunDirectory(tmp_path / "out")
        evaluation = Evaluation(host, toy_tokenizer())
        self.builder = JobBuilder(host, evaluation.tokenizer, evaluation)
        jobs, snapshot = [add_job(host, config) for config in configs], None
        if resume:
            snapshot, _ = directory.checkpoints.newest()
            running = snapshot.jobs.keys() - snapshot.done
            settings = [snapshot.jobs[name].settings for name in sorted(running)]
            jobs += [self.builder.build(JobConfig.model_validate(one)) for one in settings]
        self.engine = Engine(host, jobs, evaluation, directory, self.spoken)
        if resume:
            self.engine.load_state(snapshot)
        self.lead = Lead(self.engine, self.builder)
        self.options = WatchOptions(inbox, **({"exit_when_idle": True} | options))
        self.inbox = self.open_inbox()
        step = self.engine.step

        def stepping():
            step()
            after_step(self.engine)

        self.engine.step = stepping

    def open_inbox(self) -> Inbox:
        return Inbox(self.options, self.lead, self.spoken.message)

    def run(self):
        with self.inbox as inbox:
            return self.engine.run(self.lead.between_steps(inbox.between_steps))


def test_files_are_trained_and_their_states_tell_how_it_went(tmp_path, inbox):
    paths = [drop(inbox, "math"), drop(inbox, "other", name="law")]
    results = Watched(tmp_path, inbox).run()
    assert [(result.job, result.steps) for result in results] == [("math", 3), ("law", 3)]
    state = state_of(paths[1])
    assert (state["file"], state["job"], state["state"]) == ("other.yaml", "law", "done")
    assert (state["step"], state["total_steps"], state["reason"]) == (3, 3, None)
    assert state["loss"] > 0
    assert state["queued_at"] <= state["started_at"] <= state["ended_at"] <= state["updated_at"]
    assert state["result"] == str(tmp_path / "out" / "law")


def test_a_file_that_comes_later_joins_the_jobs_that_train(tmp_path, inbox):
    seen = set()

    def after_step(engine):
        seen.add(tuple(engine.jobs))
        if engine.round == 2:
            drop(inbox, "late")

    first = toy_config("first", max_steps=20)
    results = Watched(tmp_path, inbox, first, after_step=after_step).run()
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
    watched = Watched(tmp_path, inbox)
    (result,) = watched.run()
    assert (result.job, result.status) == ("well", "finished")
    state = state_of(path)
    assert state["state"] == "failed"
    assert reason in state["reason"]
    assert watched.engine.host.adapters == {}


def test_a_faulty_file_is_read_again_when_it_was_edited(tmp_path, inbox):
    path = inbox / "math.yaml"
    path.write_text("adapter: 3")
    watched = Watched(tmp_path, inbox)
    watched.run()
    assert state_of(path)["state"] == "failed"
    drop(inbox, "math")
    os.utime(path, ns=(1, 1))
    (result,) = watched.run()
    assert result.job == "math"
    assert state_of(path)["state"] == "done"
    watched.run()
    assert state_of(path)["state"] == "done"


def test_a_file_is_not_read_while_it_still_changes(tmp_path, inbox):
    watched = Watched(tmp_path, inbox)
    path = drop(inbox, "math")
    watched.inbox.look()
    assert state_of(path)["state"] == "queued"
    drop(inbox, "math", seed=1)
    watched.inbox.look()
    assert list(watched.engine.jobs) == []
    watched.inbox.look()
    assert list(watched.engine.jobs) == ["math"]
    assert state_of(path)["state"] == "running"


def test_a_file_that_is_deleted_while_it_waits_is_forgotten(tmp_path, inbox):
    watched = Watched(tmp_path, inbox)
    path = drop(inbox, "math")
    watched.inbox.look()
    path.unlink()
    watched.inbox.look()
    watched.inbox.look()
    assert list(inbox.iterdir()) == []
    assert watched.run() == []


def test_deleting_the_file_of_a_job_that_trains_stops_it(tmp_path, inbox):
    paths = [drop(inbox, "a"), drop(inbox, "b")]

    def delete(engine):
        if engine.round == 1:
            paths[0].unlink()

    watched = Watched(tmp_path, inbox, after_step=delete)
    results = {result.job: result for result in watched.run()}
    assert (results["a"].status, results["a"].steps) == ("stopped", 2)  # two looks missed it
    assert results["b"].status == "finished"
    state = state_of(paths[0])
    assert state["state"] == "stopped"
    assert "was deleted" in state["reason"]
    assert (tmp_path / "out/a/adapter_model.safetensors").exists()


def test_a_watch_that_was_interrupted_goes_on_to_the_same_weights(tmp_path, inbox):
    paths = [drop(inbox, "a"), drop(inbox, "b", name="c")]
    Watched(tmp_path / "unbroken", inbox).run()
    for path in inbox.glob("*.state.json"):
        path.unlink()

    def interrupt(engine):
        if engine.round == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit, match="143"):
        Watched(tmp_path, inbox, after_step=interrupt).run()
    state = state_of(paths[0])
    assert (state["state"], state["step"]) == ("queued", 2)
    assert "--resume" in state["reason"]
    results = Watched(tmp_path, inbox, resume=True).run()
    assert {result.job: result.steps for result in results} == {"a": 3, "c": 3}
    assert [state_of(path)["state"] for path in paths] == ["done", "done"]
    assert_same_files(tmp_path / "out", tmp_path / "unbroken/out", ["a", "c"])


def test_files_that_are_done_stay_done_when_the_run_goes_on(tmp_path, inbox):
    path = drop(inbox, "a")
    Watched(tmp_path, inbox).run()
    before = state_of(path)
    (result,) = Watched(tmp_path, inbox, resume=True).run()
    assert result.job == "a"
    assert state_of(path) == before


def test_a_file_deleted_while_nothing_ran_stops_its_job(tmp_path, inbox):
    path = drop(inbox, "a")
    watched = Watched(tmp_path, inbox, after_step=lambda _: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        watched.run()
    path.unlink()
    (result,) = Watched(tmp_path, inbox, resume=True).run()
    assert (result.status, result.steps) == ("stopped", 1)
    assert state_of(path)["state"] == "stopped"


def test_a_job_that_was_lost_with_its_process_waits_again(tmp_path, inbox):
    path = drop(inbox, "a")
    watched = Watched(tmp_path, inbox)
    watched.inbox.look()
    watched.inbox.look()
    assert state_of(path)["state"] == "running"
    (result,) = Watched(tmp_path, inbox).run()
    assert result.status == "finished"
    assert state_of(path)["state"] == "done"


def test_a_fault_of_writing_is_told_once(tmp_path, inbox, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    path, watched = drop(inbox, "a"), Watched(tmp_path, inbox)
    monkeypatch.setattr(inbox_module, "write_json", full)
    (result,) = watched.run()
    assert result.status == "finished"
    (warning,) = [text for text in watched.spoken.messages if text.startswith("warning")]
    assert str(path) in warning
    assert "No space left" in warning


def test_a_directory_that_can_not_be_read_for_a_while_stops_no_job(tmp_path, inbox):
    drop(inbox, "a")
    away = tmp_path / "away"

    def move(engine):
        if engine.round == 1:
            inbox.rename(away)
        if engine.round == 2:
            away.rename(inbox)

    (result,) = Watched(tmp_path, inbox, after_step=move).run()
    assert (result.status, result.steps) == ("finished", 3)


def test_only_files_count(tmp_path, inbox):
    (inbox / "directory.yaml").mkdir()
    (inbox / "loop.yaml").symlink_to("loop.yaml")
    os.mkfifo(inbox / "pipe.yaml")
    for name in (".math.yaml", "notes.txt"):
        (inbox / name).write_text("half a file")
    assert Watched(tmp_path, inbox).run() == []


def test_files_of_an_earlier_run_have_no_part_in_jobs_of_their_name(tmp_path, inbox):
    old = drop(inbox, "old", name="math")
    Watched(tmp_path / "earlier", inbox).run()
    before = state_of(old)
    seen = []

    def delete(engine):
        if engine.round == 1:
            seen.append(state_of(old))
            old.unlink()

    math = toy_config("math", max_steps=5)
    (result,) = Watched(tmp_path, inbox, math, after_step=delete).run()
    assert seen == [before]
    assert (result.status, result.steps) == ("finished", 5)


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
    watched = Watched(tmp_path, inbox, exit_when_idle=False)
    with pytest.raises(KeyboardInterrupt):
        watched.run()
    assert waits[:2] == [False, False]
    assert watched.engine.results["late"].status == "finished"
    snapshot, _ = CheckpointStore(tmp_path / "out/.checkpoints").newest()
    assert snapshot.done == {"late"}


def test_a_file_that_is_renamed_and_written_again_stops_no_job(tmp_path, inbox):
    """As some editors save it; between two looks, or seen missing by one."""
    path = drop(inbox, "a")
    text = path.read_text()

    def save(engine):
        if engine.round == 1:
            path.rename(inbox / "a.yaml~")
        else:
            path.write_text(text)

    (result,) = Watched(tmp_path, inbox, after_step=save).run()
    assert (result.status, result.steps) == ("finished", 3)


def test_a_job_may_not_start_from_what_it_would_replace(tmp_path, inbox):
    drop(inbox, "a")
    Watched(tmp_path, inbox).run()
    path = drop(inbox, "a", start_from=str(tmp_path / "out" / "a"))
    Watched(tmp_path, inbox, overwrite=True).run()
    assert "start_from must not be in what the run writes" in state_of(path)["reason"]
    assert (tmp_path / "out" / "a" / "adapter_model.safetensors").exists()


def test_a_directory_that_can_not_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match="--watch must name a directory"),
        sole_trainer(tmp_path / "file"),
    ):
        pass


@pytest.mark.parametrize("call", ["stat", "read_bytes"])
def test_a_file_that_can_not_be_looked_at_for_a_while_stops_no_job(
    tmp_path, inbox, monkeypatch, call
):
    """An error of the device is no sign that the file was deleted or edited."""
    path, other = drop(inbox, "a"), drop(inbox, "b")
    original = getattr(Path, call)

    def broken(file, *args, **options):
        if file == path and watched.engine.round in (1, 2):
            raise OSError(5, "Input/output error")
        return original(file, *args, **options)

    watched = Watched(tmp_path, inbox)
    monkeypatch.setattr(Path, call, broken)
    results = {result.job: result.status for result in watched.run()}
    assert results == {"a": "finished", "b": "finished"}
    assert [state_of(one)["state"] for one in (path, other)] == ["done", "done"]


def test_a_directory_of_job_files_has_one_trainer(inbox):
    with (
        sole_trainer(inbox),
        pytest.raises(ConfigError, match=r"no other run watches, .* is watched by another"),
        sole_trainer(inbox),
    ):
        pass
    with sole_trainer(inbox):
        pass


@pytest.mark.parametrize(
    "text", ["[1]", "[" * 100_000, '{"state": 3}', '{"job": [], "state": "done"}']
)
def test_a_state_file_of_something_else_counts_for_nothing(tmp_path, inbox, text):
    path = drop(inbox, "a")
    path.with_name("a.state.json").write_text(text)
    Watched(tmp_path, inbox).run()
    assert state_of(path)["state"] == "done"
