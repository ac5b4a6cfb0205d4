"""A method of somebody else's package is a method like ours."""

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import loraloom.adapters
from loraloom.adapters.lora import LoraProjection
from loraloom.adapters.low_rank import LowRankConfig
from loraloom.errors import AdapterError, ConfigError, FormatError
from loraloom.formats.files import model_card
from loraloom.training.settings import RunConfig
from tests.conftest import build_tokenizer
from tests.tiny import randomise, tiny_host, tiny_ids


class HalfConfig(LowRankConfig):
    """A LoRA by another name."""

    peft_type = "HALF"
    title = "Half"
    formula = "y = Wx + s·BAx"
    method: Literal["half"] = "half"
    share: float | None = 0.5
    bias: bool = False

    def projection(self, base, block, dtype, seed):
        return LoraProjection(base, self, None, dtype, seed)


@pytest.fixture
def registered(methods_as_before):
    return loraloom.register_method(HalfConfig)


def run_settings(method: str = "lora", objective: str = "sft") -> dict[str, Any]:
    train = {"objective": {"name": objective}, "max_steps": 1}
    job = {"name": "a", "adapter": {"method": method}, "data": {"task": "skills"}, "train": train}
    return {"base_model": "base", "output_dir": "out", "jobs": [job]}


def test_run_files_take_a_registered_method(registered):
    assert isinstance(RunConfig.model_validate(run_settings("half")).jobs[0].adapter, registered)
    with pytest.raises(ValueError, match="half"):
        RunConfig.model_validate(run_settings("other"))


def test_a_method_may_be_registered_before_anything_else_is_imported():
    source = Path(__file__).read_text()
    script = f"""
from typing import Literal
import loraloom
from loraloom.adapters.lora import LoraProjection
from loraloom.adapters.low_rank import LowRankConfig
{source[source.index("class HalfConfig") : source.index("@pytest.fixture")]}
loraloom.register_method(HalfConfig)
print(loraloom.RunConfig.model_validate({run_settings("half")!r}).jobs[0].adapter.method)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.stdout == "half\n", ran.stderr


def test_files_of_a_registered_method_are_read_back_where_it_is_known(
    registered, tmp_path, monkeypatch
):
    host = tiny_host(configs={})
    randomise(host.add("a", registered(rank=2, target_modules=("q_proj", "up_proj"), share=None)))
    host.save("a", tmp_path)
    assert host.load("b", tmp_path).config == host.adapter("a").config
    with torch.no_grad():
        logits = [host(tiny_ids(1), adapters=[name]).logits for name in ("a", "b", None)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])
    loraloom.adapters.CONFIGS.remove(registered)
    message = r"one of LORA, .*, got 'HALF' of the package 'tests'; install a package"
    with pytest.raises(FormatError, match=message):
        host.load("c", tmp_path)
    monkeypatch.setattr(LoraProjection, "maps_rank_space", True)  # no weights stand for that
    with pytest.raises(AdapterError, match="must be without routers to be merged"):
        host.merge("a")
    with pytest.raises(AdapterError, match="to be a GGUF adapter"):
        loraloom.export(host, build_tokenizer(), "a", tmp_path / "a.gguf", "gguf")
    with pytest.raises(AdapterError, match="must be LoRAs, got Half"):
        host.combine(["a", "b"], [0.5, 0.5], name="both")


class ForgetfulProjection(LoraProjection):
    """Saves no B."""

    def tensors(self):
        yield f"{self.key}.lora_A", self.lora_A.detach()


def test_parameters_that_files_would_lack_are_refused():
    class ForgetfulConfig(HalfConfig):
        """A LoRA half of which is saved."""

        title = "Forgetful"

        def projection(self, base, block, dtype, seed):
            return ForgetfulProjection(base, self, None, dtype, seed)

    message = r"Forgetful must yield views of all trained .* none or a part of layers.0.*q_proj"
    with pytest.raises(AdapterError, match=message):
        tiny_host(configs={}).add("a", ForgetfulConfig(rank=2))


def test_a_configuration_that_lacks_something_is_refused():
    class UntitledConfig(LowRankConfig):
        """A method whose model cards would have no name for it."""

        peft_type = "UNTITLED"
        formula = "y = Wx"

    class ForeignConfig(HalfConfig):
        """A method whose tensors another library would name."""

        layout = "peft"

    with pytest.raises(ConfigError, match=r"UntitledConfig\.title must be a string, got none"):
        loraloom.register_method(UntitledConfig)

    class NamelessConfig(HalfConfig):
        """A method that no run file could name."""

        method: str

    with pytest.raises(ConfigError, match=r"NamelessConfig\.method must have a name as its"):
        loraloom.register_method(NamelessConfig)
    with pytest.raises(ConfigError, match=r"ForeignConfig\.layout must be .native., got 'peft'"):
        loraloom.register_method(ForeignConfig)


def test_names_that_are_taken_are_refused(registered):
    assert loraloom.register_method(registered) is registered
    names = {"__doc__": "A twin.", "__module__": __name__}
    again = type("HalfConfig", (HalfConfig,), names)  # its definition is executed once more
    assert loraloom.register_method(again) in loraloom.adapters.CONFIGS
    assert registered not in loraloom.adapters.CONFIGS
    twin = type("Twin", (HalfConfig,), names)
    with pytest.raises(ConfigError, match=r"method 'half' .* registered for HalfConfig"):
        loraloom.register_method(twin)


def test_a_package_makes_its_method_known_to_every_process(
    tmp_path, monkeypatch, methods_as_before
):
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
    config = fresh["parse_adapter_config"]({"method": "halves", "rank": 2})
    assert (config.title, config.package) == ("Halves", "halves")
    assert "the package halves's, which must be installed" in model_card(config, tiny_host().base)
