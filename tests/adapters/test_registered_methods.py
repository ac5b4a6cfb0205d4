"""A method of somebody else's package is a method like ours."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch

import loraloom.adapters
from loraloom.adapters.lora import LoraProjection
from loraloom.adapters.low_rank import LowRankConfig
from loraloom.errors import ConfigError
from loraloom.training.settings import RunConfig
from tests.tiny import randomise, tiny_host, tiny_ids


class HalfConfig(LowRankConfig):
    """A LoRA by another name."""

    peft_type = "HALF"
    title = "Half"
    formula = "y = Wx + s·BAx"
    method: Literal["half"] = "half"

    def projection(self, base, layer, dtype, seed):
        return LoraProjection(base, self, None, dtype, seed)


@pytest.fixture
def registered(methods_as_before):
    return loraloom.register_method(HalfConfig)


def run_settings(method: str) -> dict:
    job = {"name": "a", "adapter": {"method": method, "rank": 3}, "data": {"task": "skills"}}
    job["train"] = {"max_steps": 1, "batch_size": 1, "learning_rate": 1e-3}
    return {"base_model": "base", "output_dir": "out", "jobs": [job]}


def test_run_files_take_a_registered_method(registered):
    assert isinstance(RunConfig.model_validate(run_settings("half")).jobs[0].adapter, registered)
    with pytest.raises(ValueError, match="half"):
        RunConfig.model_validate(run_settings("other"))


def test_a_method_may_be_registered_before_anything_else_is_imported():
    source = Path(__file__).read_text()
    method = source[source.index("class HalfConfig") : source.index("@pytest.fixture")]
    script = f"""
from typing import Literal
import loraloom
from loraloom.adapters.lora import LoraProjection
from loraloom.adapters.low_rank import LowRankConfig
{method}
loraloom.register_method(HalfConfig)
print(loraloom.RunConfig.model_validate({run_settings("half")!r}).jobs[0].adapter.method)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.stdout == "half\n", ran.stderr


def test_files_of_a_registered_method_are_read_back(registered, tmp_path):
    host = tiny_host(configs={})
    randomise(host.add("a", registered(rank=2, target_modules=("q_proj", "up_proj"))))
    host.save("a", tmp_path)
    assert host.load("b", tmp_path).config == host.adapter("a").config
    with torch.no_grad():
        logits = [host(tiny_ids(1), adapters=[name]).logits for name in ("a", "b", None)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_names_that_are_taken_are_refused(registered):
    assert loraloom.register_method(registered) is registered
    twin = type("Twin", (HalfConfig,), {"__doc__": "A twin."})
    with pytest.raises(ConfigError, match=r"method 'half' .* HalfConfig has one of them"):
        loraloom.register_method(twin)


def test_a_package_makes_its_method_known_to_every_process(tmp_path, monkeypatch):
    (tmp_path / "halves.py").write_text(
        "from typing import Literal\n"
        "from loraloom.adapters.low_rank import LowRankConfig\n\n\n"
        "class Halves(LowRankConfig):\n"
        '    peft_type, title, formula = "HALVES", "Halves", "y"\n'
        '    method: Literal["halves"] = "halves"\n\n'
        "    def build(self, name, base_layers, dtype, seed): ...\n"
    )
    metadata = tmp_path / "halves-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: halves\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[loraloom.methods]\nhalves = halves:Halves\n")
    monkeypatch.syspath_prepend(tmp_path)
    # As the package is executed in a new process.
    fresh = runpy.run_path(loraloom.adapters.__file__)
    assert fresh["parse_adapter_config"]({"method": "halves", "rank": 2}).title == "Halves"
