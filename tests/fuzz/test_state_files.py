"""What a run leaves for `--resume`, broken in every way: snapshots, job files' states, journals."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import loraloom
from loraloom.training.builder import JobBuilder
from loraloom.training.client import TrainingClient
from loraloom.training.engine import Engine
from loraloom.training.inbox import Inbox, WatchOptions
from loraloom.training.parallel import Lead
from loraloom.training.progress import Progress
from loraloom.training.run import train
from loraloom.training.settings import RunConfig
from loraloom.training.store import MANIFEST, CheckpointStore
from tests.fuzz.harness import EXTREMES, broken_bytes, fuzz, mutated, survives
from tests.training.saved import run_settings, save_inputs
from tests.training.toy import (
    ADAPTERS,
    add_job,
    toy_config,
    toy_engine,
    toy_examples,
    toy_host,
    toy_tokenizer,
)

STATE = {
    "file": "a.yaml",
    "state": "running",
    "job": "a",
    "reason": None,
    "step": 3,
    "total_steps": 9,
    "loss": 1.5,
    "queued_at": "2026-03-01T22:10:04+00:00",
    "started_at": None,
    "ended_at": None,
    "result": "runs/a",
    "sha256": "6f0c",
    "updated_at": "2026-03-01T22:10:04+00:00",
}


class HaltError(Exception):
    """Ends a run where a kill would."""


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A sweep of two jobs that ended in the midst of its third round, and its base model."""
    inputs = save_inputs(tmp_path_factory.mktemp("inputs"))
    settings = run_settings(inputs, inputs / "out")
    job, _ = settings.pop("jobs")
    settings["sweep"] = {"job": job, "parameters": {"train.learning_rate": [1e-3, 1e-2]}}
    run = RunConfig.model_validate(settings)
    model, tokenizer = loraloom.load_base_model(run.base_model)
    base = loraloom.attach(model), tokenizer

    def halt(engine, _):
        if engine.round == 3:
            raise HaltError

    with pytest.raises(HaltError):
        train(run, base=base, between_steps=halt)
    return run, base


def go_on(directory: Path, interrupted: Any) -> None:
    """Resume a copy of the run up to where it would train."""
    run, base = interrupted
    run = run.model_copy(update={"output_dir": directory})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "run", lambda engine, *callbacks: [])
        train(run, resume=True, base=base, progress=Progress())


def with_copy(interrupted: Any, change: Any) -> None:
    """Change a copy of the run's directory, and resume it."""
    with tempfile.TemporaryDirectory() as directory:
        copy = shutil.copytree(interrupted[0].output_dir, Path(directory, "out"))
        change(copy)
        survives(lambda: go_on(copy, interrupted))


def newest(directory: Path) -> Path:
    """The snapshot that a run goes on from."""
    return max((directory / ".checkpoints").glob("snapshot-*"))


def write_signed(manifest: Path, body: Any) -> None:
    """Write a manifest whose checksum is right."""
    if isinstance(body, dict):
        text = json.dumps(body, sort_keys=True).encode()
        body = body | {"checksum": hashlib.sha256(text).hexdigest()}
    manifest.write_text(json.dumps(body))


def read_body(manifest: Path) -> Any:
    body = json.loads(manifest.read_text())
    del body["checksum"]
    return body


@given(data=st.data())
@fuzz
def test_manifests_with_other_values(data: st.DataObject, interrupted: Any) -> None:
    def change(directory: Path) -> None:
        manifest = newest(directory) / MANIFEST
        write_signed(manifest, data.draw(mutated(read_body(manifest))))

    with_copy(interrupted, change)


@given(data=st.data(), is_signed=st.booleans())
@fuzz
def test_files_with_other_bytes(data: st.DataObject, is_signed: bool, interrupted: Any) -> None:
    def change(directory: Path) -> None:
        files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
        file = data.draw(st.sampled_from(files))
        file.write_bytes(data.draw(broken_bytes(file.read_bytes())))
        if is_signed and file.suffix == ".pt":
            manifest = file.parent / MANIFEST
            body = read_body(manifest)
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            body["jobs"][file.stem]["sha256"] = digest
            write_signed(manifest, body)

    with_copy(interrupted, change)


@cache
def load_state(file: Path) -> dict[str, Any]:
    return torch.load(file, weights_only=True)


def changed(data: st.DataObject, state: Any) -> Any:
    """Put something else in a place of a state, or one level below; tensors are not drawn."""
    key = data.draw(st.sampled_from(sorted(state)))
    below = state[key]
    if isinstance(below, dict) and below and data.draw(st.booleans()):
        return state | {key: changed(data, below)}
    return state | {key: data.draw(EXTREMES)}


@given(data=st.data())
@fuzz
def test_states_with_other_values(data: st.DataObject, interrupted: Any) -> None:
    snapshots = newest(interrupted[0].output_dir)

    def change(directory: Path) -> None:
        snapshot = newest(directory)
        file = data.draw(st.sampled_from(sorted(snapshot.glob("*.pt"))))
        torch.save(changed(data, load_state(snapshots / file.name)), file)
        body = read_body(snapshot / MANIFEST)
        body["jobs"][file.stem]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
        write_signed(snapshot / MANIFEST, body)

    with_copy(interrupted, change)


@given(data=st.data())
@fuzz
def test_journals_with_other_entries(data: st.DataObject, interrupted: Any) -> None:
    def change(directory: Path) -> None:
        journal = directory / "sweep.journal"
        entries = [json.loads(line) for line in journal.read_text().splitlines()]
        entries = data.draw(mutated(entries))
        journal.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))

    with_copy(interrupted, change)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """One that has a job, which has joined it."""
    engine = toy_engine(tmp_path_factory.mktemp("engine"), [])
    engine.add(add_job(engine.host, toy_config("a", max_steps=9)))
    return engine


@given(data=st.data(), as_bytes=st.booleans())
@fuzz
def test_states_of_job_files(data: st.DataObject, as_bytes: bool, engine: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if as_bytes:
            content = data.draw(broken_bytes(json.dumps(STATE).encode()))
        else:
            content = json.dumps(data.draw(mutated(STATE))).encode()
        (directory / "a.state.json").write_bytes(content)
        (directory / "a.yaml").write_text("adapter: 3")
        options = WatchOptions(directory, exit_when_idle=True)
        builder = JobBuilder(engine.host, toy_tokenizer(), engine._evaluation)

        def look() -> None:
            with Inbox(options, Lead(engine, builder), lambda text: None) as inbox:
                inbox.look()
                inbox.look()

        survives(look)


@pytest.fixture(scope="module")
def client():
    """One that has learnt, and may learn from anything that is read."""
    client = TrainingClient(toy_host(), toy_tokenizer(), "a", ADAPTERS["lora"])
    client.forward_backward(toy_examples(2))
    client.optim_step()
    return client


@pytest.fixture(scope="module")
def client_state(client, tmp_path_factory):
    directory = tmp_path_factory.mktemp("client")
    client.save_state(directory)
    return directory


@given(data=st.data())
@fuzz
def test_states_of_clients(data: st.DataObject, client: Any, client_state: Path) -> None:
    snapshot, _ = CheckpointStore(client_state).newest()
    assert snapshot is not None
    state = changed(data, load_state(snapshot.directory / "client.pt"))
    with tempfile.TemporaryDirectory() as name:
        CheckpointStore(Path(name)).write(snapshot, {"client": state}, keep=1)
        survives(lambda: client.load_state(name))
        client.load_state(client_state)
