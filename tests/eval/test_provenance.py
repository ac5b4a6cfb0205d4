from __future__ import annotations

from loraloom.eval.provenance import describe_adapters


def test_an_adapter_is_known_by_all_files_that_it_is_read_from(tmp_path):
    read = {"adapter_config.json", "adapter_model.bin", "mixlora_model.safetensors", "config.yml"}
    for name in (*read, "README.md"):
        (tmp_path / name).write_text(name)
    described = describe_adapters({"mix": str(tmp_path)})["mix"]
    assert described["path"] == str(tmp_path)
    assert described["sha256"].keys() == read
    assert len({*described["sha256"].values()}) == len(read)
