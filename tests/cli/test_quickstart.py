import json
import shutil

import pytest

from loraloom.cli import main as cli
from loraloom.cli import quickstart
from loraloom.data import skills, tiny_base
from tests.generation.saved import save_tiny


@pytest.fixture
def made(monkeypatch, tmp_path):
    """The numbers of steps with which a base model was made: a random one, at once."""
    saved = save_tiny(tmp_path / "saved") / "base"
    steps = []

    def make(output, num_steps, on_step):
        steps.append(num_steps)
        on_step(0)
        shutil.copytree(saved, output)

    monkeypatch.setattr(tiny_base, "make_tiny_base", make)
    return steps


@pytest.mark.slow
def test_the_quickstart_makes_one_model_of_adapters(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quickstart, "NUM_LANDS", 2)
    for split in skills.QUESTIONS_IN_A_LAND:
        monkeypatch.setitem(skills.QUESTIONS_IN_A_LAND, split, 1 if split == "test" else 2)
    output = tmp_path / "out"
    words = ["quickstart", "--device", "cpu", "--max-steps", "2", "--output-dir", str(output)]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "one: the 2 adapters and a router" in printed
    assert "Adapters that the router chooses" in printed
    for name in ("land1", "land2", "together"):
        adapter = output / "adapters" / name
        assert (adapter / "adapter_model.safetensors").is_file()
        assert len((adapter / "metrics.jsonl").read_text().splitlines()) == 2
        assert json.loads((adapter / "result.json").read_text())["job"] == name
    assert (output / "adapters" / "one" / "adapter_model.safetensors").is_file()
    assert "Share of choices by task and expert" in (output / "report.html").read_text()

    assert cli.main([*words[:2], "cuda:99", *words[3:]]) == 2
    assert "device must be one that this machine has" in capsys.readouterr().err
    assert cli.main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main([*words, "--overwrite"]) == 0
    assert f"Using the tiny base model in {output / 'base'}" in capsys.readouterr().out
    assert made == [quickstart.BASE_STEPS]
