import json
import os
import shutil
from dataclasses import replace

import pytest
import torch

import loraloom
from loraloom.base.loading import load_base_model
from loraloom.errors import AdapterError, ConfigError, DataError, FormatError
from loraloom.formats.files import read_adapter
from loraloom.training import builder
from loraloom.training.checkpoints import CheckpointStore
from loraloom.training.engine import Engine
from loraloom.training.run import train
from loraloom.training.run_directory import RunDirectory
from loraloom.training.settings import RunConfig
from tests.training.running import Spoken, assert_same_files, read_metrics
from tests.training.saved import run_settings, write_run_file
from tests.training.toy import read_result

JOBS = ("plain", "mixture")


@pytest.fixture(autouse=True)
def accuracies(monkeypatch):
    """Score no questions."""
    monkeypatch.setattr(builder, "score_accuracy", score)


def score(host, tokenizer, questions, adapters):
    return {name: len(questions) / 10 for name in adapters}


def settings(inputs, output_dir, **changes):
    """Make a run; changes are `job.setting` of the train section."""
    run = run_settings(inputs, output_dir)
    for job in run["jobs"]:
        job["train"] |= changes
    return RunConfig.model_validate(run)


def test_a_run_writes_adapters_metrics_and_results(inputs, tmp_path):
    spoken = Spoken()
    run = settings(inputs, tmp_path / "out")
    plain, mixture = train(run, progress=spoken, command="loraloom train run.yaml")
    expected = {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "metrics.jsonl",
        "result.json",
        "checkpoints",
    }
    assert set(os.listdir(tmp_path / "out/plain")) == expected
    intermediate = {f"checkpoint-{step}" for step in (1, 2, 3, 4)}
    assert set(os.listdir(tmp_path / "out/mixture")) == expected | intermediate
    assert (plain.method, plain.steps, plain.weights) == ("LoRA", 4, "best")
    assert (mixture.method, mixture.metrics) == ("MixLoRA", {"eval/arc_easy/accuracy": 0.5})
    assert any("rows.jsonl: 16 rows, 12 examples" in text for text in spoken.messages)

    result = json.loads((tmp_path / "out/mixture/result.json").read_text())
    assert result["best"] == {"metric": "eval/arc_easy/accuracy", "value": 0.5, "step": 4}
    assert result["base_model"] == str(inputs / "base")
    assert result["environment"]["command"] == "loraloom train run.yaml"
    assert result["environment"]["versions"]["torch"] == torch.__version__
    assert result["peak_memory_bytes"]["rss"] > 0


def test_settings_and_files_are_read_as_the_command_line_reads_them(inputs, tmp_path, monkeypatch):
    settings = run_settings(inputs, tmp_path / "out")
    results = train(write_run_file(tmp_path / "run.yaml", settings))
    assert [result.steps for result in results] == [4, 4]
    assert train(settings, overwrite=True)[0].metrics == results[0].metrics
    with pytest.raises(ConfigError, match=r"the run: unknown key 'output'"):
        train(settings | {"output": "elsewhere"})


def test_choice_tasks_are_scored_without_an_evaluator(inputs, tmp_path, monkeypatch):
    monkeypatch.undo()
    _, mixture = train(settings(inputs, tmp_path / "out"))
    assert mixture.metrics["eval/arc_easy/accuracy"] in {0.2 * correct for correct in range(6)}


def test_results_in_the_way_are_an_error_and_nothing_is_written(inputs, tmp_path):
    run = settings(inputs, tmp_path)
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(ConfigError, match="must be new or empty"):
        train(run)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    train(run, overwrite=True)
    assert (tmp_path / "mine.txt").exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": {"dataset": "gone.txt", "format": "text"}}, DataError, r".*gone\.txt"),
        ({"adapter": {"method": "lora", "target_modules": ["no"]}}, AdapterError, "target_m.*no$"),
        ({"eval": [{"task": "piqa", "path": "gone"}]}, DataError, "gone"),
        ({"train": {"max_steps": 1, "optimizer_args": {"a": 1}}}, ConfigError, "optimizer adamw"),
    ],
    ids=["data", "module", "questions", "optimizer"],
)
def test_a_fault_in_any_job_is_found_before_anything_is_written(
    inputs, tmp_path, change, error, message
):
    run = run_settings(inputs, tmp_path / "out")
    run["jobs"][1] = {"eval": [], **run["jobs"][1], **change}
    with pytest.raises(error, match=f"job mixture: {message}"):
        train(RunConfig.model_validate(run))
    assert not (tmp_path / "out").exists()


def killed(run, monkeypatch, rounds: int, **options) -> None:
    """Begin a run and let it die after some fused steps, without a chance to save."""
    step = Engine.step

    def stepping(engine):
        if engine.round == rounds:
            raise RuntimeError("killed")
        step(engine)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", stepping)
        with pytest.raises(RuntimeError, match="killed"):
            train(run, **options)


def test_resume_after_a_crash_gives_the_weights_of_an_unbroken_run(inputs, tmp_path, monkeypatch):
    train(settings(inputs, tmp_path / "unbroken"))
    for rounds in (1, 5):
        run = settings(inputs, tmp_path / f"killed-{rounds}")
        killed(run, monkeypatch, rounds)
        assert [result.steps for result in train(run, resume=True)] == [4, 4]
        assert_same_files(run.output_dir, tmp_path / "unbroken", JOBS)
        for name in JOBS:
            steps = [line["step"] for line in read_metrics(run.output_dir / name)]
            assert steps == sorted(steps)
            assert len(steps) == len(set(steps)) + {"plain": 2, "mixture": 1}[name]


def test_resume_builds_jobs_that_joined_again(inputs, tmp_path, monkeypatch):
    def join(engine, builder):
        if engine.round == 1 and "joined" not in engine.jobs:
            engine.add(
                builder.build(engine.jobs["plain"].config.model_copy(update={"name": "joined"}))
            )

    train(settings(inputs, tmp_path / "unbroken"), between_steps=join)
    run = settings(inputs, tmp_path / "out")
    killed(run, monkeypatch, 3, between_steps=join)
    store = CheckpointStore(shutil.copytree(tmp_path / "out", tmp_path / "other") / ".checkpoints")
    checkpoint = store.newest()[0]
    checkpoint.jobs["joined"].settings["adapter"]["method"] = "of_a_package_that_is_gone"
    jobs = {name: replace(record, sha256=None) for name, record in checkpoint.jobs.items()}
    store.write(replace(checkpoint, jobs=jobs), {})
    with pytest.raises(ConfigError, match="--resume: job joined: adapter must have a 'method' of"):
        train(settings(inputs, tmp_path / "other"), resume=True)
    steps = {result.job: result.steps for result in train(run, resume=True)}
    assert steps == {"plain": 4, "mixture": 4, "joined": 4}
    assert_same_files(tmp_path / "out", tmp_path / "unbroken", list(steps))


def test_resume_of_a_finished_run_trains_nothing(inputs, tmp_path):
    run = settings(inputs, tmp_path / "out")
    results = train(run, command="loraloom train caf\udce9.yaml")  # a name that is not UTF-8
    assert train(run, resume=True) == results


@pytest.mark.parametrize("options", [{}, {"resume": True}])
def test_two_runs_do_not_write_to_one_directory(inputs, tmp_path, monkeypatch, options):
    run = settings(inputs, tmp_path / "out")
    if options:
        killed(run, monkeypatch, 3)
    with RunDirectory(run.output_dir).opened(resume=bool(options), overwrite=False):
        before = {path: path.stat().st_mtime_ns for path in run.output_dir.rglob("*")}
        with pytest.raises(ConfigError, match="not be in use by another run"):
            train(run, **options)
        assert {path: path.stat().st_mtime_ns for path in run.output_dir.rglob("*")} == before
    assert [result.steps for result in train(run, **options)] == [4, 4]


def test_resume_with_other_settings_is_an_error_that_names_them(inputs, tmp_path, monkeypatch):
    killed(settings(inputs, tmp_path / "out"), monkeypatch, 3)
    other = settings(inputs, tmp_path / "out", learning_rate=1.0)
    changes = r"base\.dtype was 'float32' .*; job plain: train\.learning_rate was 0\.005 and is 1"
    with pytest.raises(ConfigError, match=changes):
        train(other.model_copy(update={"dtype": "float64"}), resume=True)


def preference_settings(inputs, output_dir, **objective):
    """Make a run of two jobs that learn from pairs: of a file, and of a task."""
    run = run_settings(inputs, output_dir)
    pairs = {"dataset": str(inputs / "pairs.jsonl"), "format": "preference"}
    run["jobs"][0]["data"] = {**pairs, "validation_fraction": 0.25}
    run["jobs"][0]["train"]["objective"] = {"name": "dpo", **objective}
    run["jobs"][1]["train"]["objective"] = {"name": "cpo"}
    return RunConfig.model_validate(run)


def test_preferences_of_a_file_and_of_a_task_are_learnt_together(inputs, tmp_path, monkeypatch):
    train(settings(inputs, tmp_path / "first", max_steps=1))
    reference = str(tmp_path / "first" / "mixture")
    whole = train(preference_settings(inputs, tmp_path / "out", reference=reference))
    assert whole[0].metrics["eval/rewards/accuracies"] <= 1
    assert whole[1].data[0].startswith("arc_easy (text): 5 rows, 5 pairs")
    run = preference_settings(inputs, tmp_path / "resumed", reference=reference)
    killed(run, monkeypatch, 3)
    train(run, resume=True)
    assert_same_files(tmp_path / "resumed", tmp_path / "out", JOBS)


@pytest.mark.parametrize("setting", ["start_from", "reference"])
def test_an_adapter_that_the_run_would_replace_can_not_be_read_by_it(inputs, tmp_path, setting):
    train(settings(inputs, tmp_path / "out"))
    own = str(tmp_path / "out" / "plain")
    reference = own if setting == "reference" else "base"
    run = preference_settings(inputs, tmp_path / "out", reference=reference)
    run = run.model_dump(mode="json")
    if setting == "start_from":
        run["jobs"][0]["start_from"] = "~nobody-of-this-name/adapter"
        with pytest.raises(FormatError, match="job plain: an adapter must be a path, got '~nobody"):
            train(RunConfig.model_validate(run), overwrite=True)
        run["jobs"][0]["start_from"] = f"{own}/checkpoints/last"
    with pytest.raises(ConfigError, match=rf"{setting} must not be in what the run writes"):
        train(RunConfig.model_validate(run), overwrite=True)
    assert (tmp_path / "out/plain/adapter_model.safetensors").exists()


def test_a_job_goes_on_from_an_adapter_and_is_held_at_it(inputs, tmp_path):
    train(settings(inputs, tmp_path / "first"))
    start = str(tmp_path / "first" / "plain")
    run = preference_settings(inputs, tmp_path / "out", reference=start).model_dump(mode="json")
    run["jobs"][0]["start_from"] = start
    train(RunConfig.model_validate(run))
    first, second = (line["rewards/margins"] for line in read_metrics(tmp_path / "out/plain")[:2])
    assert first == pytest.approx(0, abs=1e-5)
    assert abs(second) > 1e-4


def test_a_run_does_not_go_on_with_other_data(inputs, tmp_path, monkeypatch):
    inputs = shutil.copytree(inputs, tmp_path / "inputs")
    run = settings(inputs, tmp_path / "out")
    killed(run, monkeypatch, 3)
    for file, old, new, what in (
        ("rows.jsonl", "Say blue 1", "Say blue 3", "job plain: examples"),
        ("arc_easy/train.jsonl", "What is 2", "What is 9", "job mixture: examples"),
        ("arc_easy/validation.jsonl", "What is 2", "What is 9", "job mixture: questions"),
    ):
        text = (inputs / file).read_text()
        (inputs / file).write_text(text.replace(old, new))
        with pytest.raises(ConfigError, match=f"data of the interrupted run.*{what}; restore"):
            train(run, resume=True)
        (inputs / file).write_text(text)
    assert [result.steps for result in train(run, resume=True)] == [4, 4]


def test_the_best_weights_are_those_of_the_snapshot_after_a_kill(inputs, tmp_path, monkeypatch):
    """It comes after better weights and the results were written, before a snapshot knows."""
    run = settings(inputs, tmp_path / "out", learning_rate=1e-4)
    writes, write = [], CheckpointStore.write

    def dying(store, moment, *args, **options):
        writes.append(moment.round)
        if len(writes) == 4:
            raise KeyboardInterrupt
        write(store, moment, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "write", dying)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    assert read_result(tmp_path / "out/plain").best["step"] == 4, "written before the kill"
    snapshot, _ = RunDirectory(run.output_dir).checkpoints.newest()
    assert snapshot.round < 4
    best = snapshot.load_state("plain")["best"]

    def stop(engine, _):
        if "plain" in engine.jobs:
            assert not (tmp_path / "out/plain/result.json").exists()
            engine.stop("plain", "enough")

    assert train(run, resume=True, between_steps=stop)[0].best["step"] == 2
    host = loraloom.attach(load_base_model(run.base_model)[0])
    _, tensors = read_adapter(tmp_path / "out/plain", host.base)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in best.items())


def test_a_run_that_ends_with_an_error_leaves_a_given_host_as_it_was(inputs, tmp_path, monkeypatch):
    run = settings(inputs, tmp_path / "out")
    model, tokenizer = load_base_model(run.base_model)
    host = loraloom.attach(model)
    killed(run, monkeypatch, 2, base=(host, tokenizer))
    assert host.adapters == {}
    for checkpointing in (True, False):
        host.enable_gradient_checkpointing(checkpointing)
        changes = {"max_steps": 1, "gradient_checkpointing": not checkpointing}
        other = settings(inputs, tmp_path / "other", **changes)
        train(other, base=(host, tokenizer), overwrite=True)
        assert host.gradient_checkpointing is checkpointing
    assert train(run, base=(host, tokenizer), resume=True)[0].steps == 4
