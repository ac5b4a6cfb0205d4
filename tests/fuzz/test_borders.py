"""What comes in is read or refused in one clear message, however it is broken."""

import gzip
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import loraloom
from loraloom.cli import main as cli
from loraloom.config.data import SourceConfig
from loraloom.data.encoding import SourceEncoder
from loraloom.errors import LoraloomError
from loraloom.eval.results import read_evaluation
from loraloom.eval.statistics import read_answers
from loraloom.formats import describe, read_adapter, write_adapter
from loraloom.report.jobs import read_runs
from loraloom.training.checkpoints import MANIFEST
from loraloom.training.engine import Engine
from loraloom.training.reporting import Progress
from loraloom.training.run import train
from loraloom.training.settings import RunConfig, load_run_config
from tests.conftest import build_tokenizer
from tests.formats.tiny import llama_base, make_tensors
from tests.fuzz.harness import EXTREMES, broken_bytes, fuzz, mutated, survives
from tests.report.made import evaluation, write_evaluation, write_run
from tests.tiny import ALL_METHODS
from tests.training.saved import run_settings, save_inputs


def break_json(data: st.DataObject, path: Path) -> None:
    """Break a JSON file's value, or its bytes."""
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(broken_bytes(path.read_bytes())))
    else:
        path.write_text(json.dumps(data.draw(mutated(json.loads(path.read_text())))))


RUN = {
    "base_model": "smollm2-135m",
    "dtype": "bfloat16",
    "output_dir": "runs/none",
    "memory_limit": "20GB",
    "jobs": [
        {
            "name": "a",
            "adapter": {"method": "mixlora", "experts": {"rank": 4}, "num_experts": 4},
            "data": {"mix": [{"task": "boolq"}, {"dataset": "a.jsonl", "format": "chat"}]},
            "train": {"max_steps": 9, "learning_rate": 1e-4, "optimizer_args": {"eps": 1e-8}},
            "eval": [{"task": "boolq", "path": "data", "limit": 5}],
        },
        {
            "name": "b",
            "adapter": {"method": "lora", "target_modules": ["q_proj"], "init": "gaussian"},
            "data": {"dataset": "a.jsonl", "format": "text", "streaming": True},
            "train": {"max_steps": 9, "lr_scheduler": "cosine", "objective": {"name": "sft"}},
        },
    ],
    "sweep": {"job": "a", "parameters": {"adapter.rank": [4, 8]}, "metric": "eval/boolq/accuracy"},
}


@fuzz
@given(st.data(), st.text(max_size=30), EXTREMES)
def test_run_files(tmp_path, data, path, value):
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(RUN))
    survives(lambda: load_run_config(file, [f"{path}={value}", f"jobs.0.train.{path}={value}"]))
    break_json(data, file)
    survives(lambda: load_run_config(file), tmp_path)


CALL = {"function": {"name": "color", "arguments": {"of": "sky"}}}
TURNS = [{"role": "user", "content": "color?"}, {"role": "assistant", "content": "blue"}]
ROWS: dict[str, list[dict[str, Any]]] = {
    "instruction": [{"instruction": "Say one.", "input": "", "output": "one"}] * 3,
    "chat": [
        {"messages": [*TURNS, TURNS[0], {"role": "assistant", "tool_calls": [CALL]}, TURNS[1]]},
        {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "blue"}]},
    ],
    "text": [{"text": "the sky is blue"}] * 3,
    "preference": [{"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": TURNS[1:]}],
    "piqa": [{"goal": "go", "sol1": "left", "sol2": "right", "label": 1}],
}
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ m.tool_calls }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
FRAGMENTS = [
    *("{% for i in range(99) %}", "{% endfor %}", "{{ 1/0 }}", "{{", "}}", "{{ messages[0].x }}"),
    *("{{ instruction ~ instruction }}", "{{ [].__class__ }}", "{% generation %}", "{# ", "\0"),
    *("{{ raise_exception('no') }}", "{% include 'x' %}", "{{ '\\ud800' }}", "{% set x %}"),
]


def encode(path: Path, kind: str, **settings: Any) -> None:
    """Read and encode a file as training does."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    if kind == "piqa":
        source = SourceConfig(task=kind, path=str(path), scoring="text")
    else:
        source = SourceConfig(dataset=str(path), format=kind, **settings)
    SourceEncoder(source, tokenizer, 64).load("train")


@pytest.mark.parametrize("kind", ROWS)
@fuzz
@given(st.data())
def test_data_files(tmp_path, kind, data):
    suffix = data.draw(st.sampled_from([".json", ".jsonl", ".jsonl.gz"]))
    rows = data.draw(st.just(ROWS[kind]) | mutated(ROWS[kind]))
    lines = rows if suffix != ".json" and isinstance(rows, list) else [rows]
    text = "\n".join(map(json.dumps, lines)).encode()
    content = gzip.compress(text) if suffix.endswith(".gz") else text
    file = tmp_path / f"train{suffix}"
    file.write_bytes(data.draw(st.just(content) | broken_bytes(content)))
    survives(lambda: encode(file, kind), tmp_path)


@pytest.mark.parametrize("kind", ["instruction", "chat"])
@fuzz
@given(st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=5))
def test_templates(tmp_path, kind, fragments):
    (tmp_path / "train.json").write_text(json.dumps(ROWS[kind]))
    setting = {"template" if kind == "instruction" else "chat_template": "".join(fragments)}
    survives(lambda: encode(tmp_path / "train.json", kind, **setting), tmp_path)


BASE = llama_base()
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
TENSORS: dict[str, Callable[[torch.Tensor], Any]] = {
    "not a number": lambda tensor: tensor * float("nan"),
    "float8": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "whole numbers": lambda tensor: tensor.to(torch.int64),
    "flat": lambda tensor: tensor.flatten(),
    "empty": lambda tensor: tensor[:0],
    "no axis": lambda tensor: tensor.sum(),
}
PICKLED: dict[str, Callable[[torch.Tensor], Any]] = TENSORS | {
    "sparse": lambda tensor: tensor.to_sparse(),
    "without data": lambda tensor: tensor.to("meta"),
    "expanded": lambda tensor: torch.zeros(1).expand(10**6, 10**6),
    "a text": lambda tensor: "tensor",
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Path:
    """An adapter of each method, in a directory of its name."""
    place = tmp_path_factory.mktemp("adapters")
    for method, config in ALL_METHODS.items():
        write_adapter(place / method, config, make_tensors(config, BASE), BASE)
    return place


def break_tensors(data: st.DataObject, directory: Path) -> None:
    """Change, drop or rename a tensor, in safetensors or in a pickle."""
    tensors: dict[str, Any] = dict(load_file(directory / WEIGHTS))
    is_pickle, name = data.draw(st.booleans()), data.draw(st.sampled_from(sorted(tensors)))
    kinds = PICKLED if is_pickle else TENSORS
    match data.draw(st.sampled_from(["change", "drop", "rename"])):
        case "change":
            tensors[name] = kinds[data.draw(st.sampled_from(sorted(kinds)))](tensors[name])
        case "drop":
            del tensors[name]
        case "rename":
            tensors[data.draw(st.sampled_from(["x", "a\x1b[31m", "experts.٣", "9" * 5000]))] = (
                tensors.pop(name)
            )
    if is_pickle:
        (directory / WEIGHTS).unlink()
        torch.save(tensors, directory / PICKLE)
    else:
        whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(whole, directory / WEIGHTS)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, on sparse tensors
@fuzz
@given(st.data())
def test_adapters(adapters, tmp_path, data):
    directory = tmp_path / "a"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(adapters / data.draw(st.sampled_from(sorted(ALL_METHODS))), directory)
    match data.draw(st.sampled_from(["config", "tensors", "bytes"])):
        case "config":
            break_json(data, directory / CONFIG)
        case "tensors":
            break_tensors(data, directory)
        case "bytes":
            weights = directory / WEIGHTS
            weights.write_bytes(data.draw(broken_bytes(weights.read_bytes())))
    survives(lambda: read_adapter(directory, BASE), tmp_path)
    survives(lambda: describe(directory), tmp_path)


@fuzz
@given(path=st.text() | EXTREMES.map(str) | st.sampled_from(["a/" * 3000, "owner/\x1b[31m"]))
def test_paths_of_adapters(path, monkeypatch):
    def no_hub(*args: Any, **options: Any) -> str:
        raise OSError("no hub here")

    monkeypatch.setattr("loraloom.formats.raw_files.snapshot_download", no_hub)
    monkeypatch.setenv("HOME", tempfile.gettempdir())
    assert survives(lambda: read_adapter(path, BASE)) is not None


ANSWER = {"task": "arc_easy", "split": "test", "question": "0123456789abcdef", "correct": True}


@fuzz
@given(st.data())
def test_results(tmp_path, data):
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    run = write_run(tmp_path / "run", ["mix"], num_steps=3)
    evaluated = write_evaluation(tmp_path / "e.json", evaluation(["mix"], ["piqa"]))
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps(ANSWER | {"index": 0, "adapter": "base"}))
    break_json(data, data.draw(st.sampled_from([evaluated, run / "mix/result.json", answers])))
    survives(lambda: read_runs([run]))
    survives(lambda: read_evaluation(evaluated))
    survives(lambda: read_answers(answers))


@fuzz
@given(
    st.lists(
        st.tuples(
            st.sampled_from("max-new-tokens temperature top-k top-p seed stop".split()), EXTREMES
        ),
        max_size=4,
    )
)
def test_options(words):
    """The command line refuses its words with exit code 2, or they are settings."""

    def read(*args: Any, **options: Any) -> None:
        raise LoraloomError("the settings were read")

    argv = [part for option, value in words for part in (f"--{option}", str(value))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loraloom.cli.generate.load_host", read)
        assert cli.main(["generate", "--base-model", "x", "--prompt", "x", *argv]) == 2


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


@fuzz
@given(data=st.data())
def test_snapshots(data, interrupted):
    run, base = interrupted
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        copy = shutil.copytree(run.output_dir, Path(place, "out"))
        manifest = max((copy / ".checkpoints").glob("snapshot-*")) / MANIFEST
        files = sorted(path for path in copy.rglob("*") if path.is_file())
        file = data.draw(st.just(manifest) | st.sampled_from(files))
        body = json.loads(manifest.read_text())
        if file == manifest:  # and its checksum is right
            body = data.draw(mutated({name: body[name] for name in body if name != "checksum"}))
        else:
            file.write_bytes(data.draw(broken_bytes(file.read_bytes())))
        if file == manifest and isinstance(body, dict):
            text = json.dumps(body, sort_keys=True).encode()
            manifest.write_text(json.dumps(body | {"checksum": hashlib.sha256(text).hexdigest()}))
        patch.setattr(Engine, "run", lambda engine, *callbacks: [])
        again = run.model_copy(update={"output_dir": copy})
        survives(lambda: train(again, resume=True, base=base, progress=Progress()))
