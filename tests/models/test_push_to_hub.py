"""What goes to the Hub: an adapter's files and its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled

from loraloom.errors import FormatError
from loraloom.formats import hub
from loraloom.formats.disk import CONFIG_FILE
from tests.tiny import METHODS, tiny_host


class Hub:
    """Stands in for huggingface_hub's API, and keeps what it is given."""

    def __init__(self):
        self.made: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id: str, **options: Any) -> str:
        self.made[repo_id] = options
        return f"https://hub/{repo_id}"

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        assert repo_id in self.made
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}


@pytest.mark.parametrize("method", ["lora", "mixlora"])
def test_an_adapter_goes_with_a_card_of_base_method_and_results(monkeypatch, tmp_path, method):
    there = Hub()
    monkeypatch.setattr(hub, "HfApi", lambda: there)
    host = tiny_host()
    address = host.push_to_hub(method, "me/math", results="| task | % |\n|---|---|", private=True)
    assert address == "https://hub/me/math"
    assert there.made == {"me/math": {"private": True, "exist_ok": True}}
    assert set(there.files) == {CONFIG_FILE, "adapter_model.safetensors", "README.md"}
    card = there.files["README.md"].decode()
    for text in (METHODS[method].title, "architecture: llama", "| task | % |", f"# {method}"):
        assert text in card
    for name, content in there.files.items():
        (tmp_path / name).write_bytes(content)
    again = host.load("again", tmp_path).tensors()
    for key, tensor in host.adapters[method].tensors().items():
        torch.testing.assert_close(again[key], tensor, check_dtype=False)


def test_no_network_is_an_error_that_says_what_to_do(monkeypatch):
    class Offline(Hub):
        def create_repo(self, repo_id: str, **options: Any) -> str:
            raise OfflineModeIsEnabled("offline mode is enabled")

    monkeypatch.setattr(hub, "HfApi", Offline)
    with pytest.raises(FormatError, match=r"offline mode is enabled\); check .*hf upload"):
        tiny_host().push_to_hub("lora", "me/math")
