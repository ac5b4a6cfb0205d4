import json
import os
import shlex
import shutil
import signal
from unittest.mock import Mock

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from loraloom.cli import main as cli
from loraloom.cli import train as train_command
from loraloom.cli.train import generate_command
from loraloom.formats import describe
from loraloom.training.engine import Engine
from loraloom.training.job import JobResult
from loraloom.training.settings import RunConfig
from tests.training.saved import run_settings, save_inputs, write_run_file

NAMES = ("plain", "mixture")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def run_file(inputs, tmp_path):
    return str(write_run_file(tmp_path / "run.yaml", run_settings(inputs, tmp_path / "out")))


def results_in(output):
    return [json.loads((output / name / "result.json").read_text()) for name in NAMES]


@pytest.fixture
def stopping(monkeypatch):
    """Let Ctrl-C come in the third round of a command."""
    step = Engine.step

    def stepping(engine):
        step(engine)
        if engine.round == 3:
            os.kill(os.getpid(), signal.SIGINT)

    def stopped(*words):
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "step", stepping)
            return cli.main([*words])

    return stopped


def test_a_dry_run_prints_memory_without_weights_and_data(inputs, run_file, tmp_path, capsys):
    shutil.copytree(inputs / "base", tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    words = ["train", run_file, "--dry-run", "--set", f"base_model={tmp_path / 'base'}"]
    settings = ["--set", "jobs.0.data.dataset=nowhere.jsonl", "--set", "jobs.0.adapter.rank=3"]
    assert cli.main([*words, *settings]) == 0
    printed = capsys.readouterr().out
    assert "plain: 2,784 trained parameters; adapter 11.14 kB, optimizer 33.41 kB" in printed
    assert "gradients and activations, 768 tokens" in printed
    assert printed.splitlines()[-1].split()[-3:] == ["fits"] * 3
    assert not (tmp_path / "out").exists()
    assert cli.main([*words, "--resume"]) == 2
    assert "--dry-run trains nothing; remove --resume" in capsys.readouterr().err


def test_changes_that_save_memory_follow_what_fits_no_card(run_file, monkeypatch, capsys):
    monkeypatch.setattr(train_command, "CARDS_GB", (0.001, 80))
    assert cli.main(["train", run_file, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()[-6:]
    peaks = [float(line.partition(" MB")[0].split()[-1]) for line in lines]
    assert (max(peaks), min(peaks)) == (peaks[0], peaks[-1])
    assert [line.split()[0] for line in lines[1:4]] == [
        "gradient_checkpointing",
        "micro_batch_size:",
        "half",
    ]


def test_adapters_are_written_and_remember_how_prompts_were(inputs, run_file, tmp_path, capsys):
    assert cli.main(["train", run_file, "--set", "jobs.0.data.template=plain"]) == 0
    printed, _, command = capsys.readouterr().out.partition("Generate with:")
    assert "plain: 1,856 trained parameters; adapter 7.42 kB, optimizer 22.27 kB" in printed
    assert "mixture: step 4, eval/arc_easy/accuracy" in printed
    assert "finished" in printed
    assert [one["status"] for one in results_in(tmp_path / "out")] == ["finished"] * 2
    assert f"--adapter plain={tmp_path / 'out/plain'}" in command
    plain, mixture = (describe(tmp_path / "out" / name)["prompt"] for name in ("plain", "mixture"))
    assert plain == {"format": "instruction", "template": "plain"}
    assert mixture == {"format": "task"}
    assert describe(tmp_path / "out/plain/checkpoints/last")["prompt"] == plain

    asked = ["--base-model", str(inputs / "base"), "--device", "cpu"]
    asked += ["--adapter", f"a={tmp_path / 'out/plain'}"]
    held_out = ["--dataset", str(inputs / "rows.jsonl"), "--no-cache", "--output"]
    assert cli.main(["eval", *asked, *held_out, str(tmp_path / "eval.json")]) == 0
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["tasks"]["rows"]["format"] == "instruction"
    output = str(tmp_path / "merged")
    exported = ["--base-model", str(inputs / "base"), "--adapter", str(tmp_path / "out/plain")]
    assert cli.main(["export", *exported, "--device", "cpu", "--output", output]) == 0
    turns = [{"role": "user", "content": "Say one"}]
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "Say one\n"


def test_a_command_asks_what_was_trained():
    job = {"name": "a", "adapter": {"method": "lora"}, "train": {"max_steps": 4}}
    job["data"] = {"task": "arc_easy"}
    settings = {"base_model": "m", "output_dir": "out", "quantization": "nf4", "jobs": [job]}
    run = RunConfig.model_validate(settings)
    done = Mock(JobResult, job="a", directory="out/a b", error=None, status="finished")
    failed = Mock(JobResult, error="x")
    command = generate_command(run, [done, failed])
    options = "--base-model m --quantization nf4 --adapter 'a=out/a b' --prompt Hello!"
    words = shlex.split(command.replace("\\\n", ""))
    assert words == shlex.split(f"loraloom generate {options}")
    assert generate_command(run, [failed]) is None
    done.job = "base"  # a name that --adapter has for the base model
    assert "base-adapter=out/a" in generate_command(run, [done])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "jobs.0.train.learnin_rate=1"], "learning_rate"),
        (["--set", "jobs.1.adapter.top_k=9"], "top_k must be in [1, num_experts=4], got 9"),
        (["--set", "base_model=gone/"], "gone/"),
        (["--resume", "--overwrite"], "exclude each other"),
        (["--watch-exit-when-idle"], "requires --watch DIR"),
        (["--set", "jobs=[]"], "a run must set jobs"),
    ],
)
def test_a_fault_is_one_message_and_code_2_and_nothing_is_written(
    run_file, tmp_path, capsys, words, message
):
    assert cli.main(["train", run_file, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_job_that_fails_gives_code_2_and_the_others_are_trained(run_file, tmp_path, capsys):
    words = ["--set", "jobs.0.train.learning_rate=1e30", "--set", "jobs.0.train.max_grad_norm=null"]
    assert cli.main(["train", run_file, *words]) == 2
    assert "error: job plain, step 2: loss must be finite" in capsys.readouterr().err
    assert [one["status"] for one in results_in(tmp_path / "out")] == ["failed", "finished"]
    tensors = load_file(tmp_path / "out/plain/adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_watch_trains_job_files_and_ctrl_c_saves_everything(inputs, stopping, tmp_path, capsys):
    run = run_settings(inputs, tmp_path / "out")
    inbox, (first, second) = tmp_path / "inbox", run.pop("jobs")
    inbox.mkdir()
    for name, job in (("one", first), ("two", second), ("bad", {**first, "adapter": 3})):
        write_run_file(inbox / f"{name}.yaml", {**job, "name": name})
    run_file = str(write_run_file(tmp_path / "run.yaml", run))
    words = ["train", run_file, "--watch", str(inbox), "--watch-exit-when-idle"]
    assert stopping(*words) == 130
    assert "pass --resume to continue from here" in capsys.readouterr().out
    assert cli.main([*words, "--resume"]) == 0
    assert "resuming after 3 steps" in capsys.readouterr().out
    files = [inbox / f"{name}.state.json" for name in ("one", "two", "bad")]
    states = [json.loads(file.read_text()) for file in files]
    assert [state["state"] for state in states] == ["done", "done", "failed"]
    assert "adapter must be" in states[2]["reason"]
    assert (tmp_path / "out/two/adapter_model.safetensors").exists()


def test_a_sweep_prints_its_ranking_and_leaves_a_table(inputs, tmp_path, capsys):
    settings = run_settings(inputs, tmp_path / "out")
    settings["sweep"] = {
        "job": settings.pop("jobs")[0],
        "parameters": {"adapter.method": ["lora", "mixlora"], "train.learning_rate": [1e-5, 1e-2]},
        "early_stopping": {"asha": {"min_steps": 2}},
    }
    assert cli.main(["train", str(write_run_file(tmp_path / "run.yaml", settings))]) == 0
    printed = capsys.readouterr().out
    assert "is not among the best after step 2" in printed
    assert printed.count(" finished") == 1
    assert len((tmp_path / "out/sweep.csv").read_text().splitlines()) == 5
