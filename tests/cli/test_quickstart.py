from __future__ import annotations

import json

import pytest

from loraloom.cli import main as cli
from loraloom.data.skills import generate_skills
from tests.infer.saved import save_tiny


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("saved")) / "base")


def test_the_quickstart_leaves_adapters_metrics_and_pictures(base_model, tmp_path, capsys):
    output = tmp_path / "out"
    words = ["quickstart", "--base-model", base_model, "--dtype", "float32", "--device", "cpu"]
    words += ["--max-steps", "2", "--output-dir", str(output)]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    for skill in {row["skill"] for row in generate_skills("test")} | {"average"}:
        assert skill in printed
    for name in ("skills-lora", "skills-mixlora"):
        assert (output / name / "adapter_model.safetensors").is_file()
        assert len((output / name / "metrics.jsonl").read_text().splitlines()) == 2
        assert json.loads((output / name / "result.json").read_text())["job"] == name
    for picture in ("loss.png", "experts.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
    assert "skills-mixlora minus skills-lora: " in printed
    assert printed.count("  loraloom ") == 3  # what to try next

    assert cli.main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
