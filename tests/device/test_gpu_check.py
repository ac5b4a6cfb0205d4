"""The page that a first run on a card writes, here of the pretend device."""

from argparse import Namespace

from benchmarks import gpu_check


def test_all_parts_run_and_what_they_compare_is_right(accelerator, tmp_path, monkeypatch):
    methods = {name: gpu_check.METHODS[name] for name in ("LoRA", "MixDoRA")}
    steps = {name: configs[:2] for name, configs in gpu_check.STEPS.items()}
    sizes = {"METHODS": methods, "ON_EXPERTS": tuple(methods), "STEPS": steps}
    sizes |= {"NUM_DECODED": 4, "NUM_NEW_TOKENS": 4}
    for name, value in sizes.items():
        monkeypatch.setattr(gpu_check, name, value)
    options = Namespace(device="auto", output=tmp_path / "page.md", size="tiny", steps=1)
    gpu_check.write_page(options, lambda part, options: list(gpu_check.PARTS[part](options)))
    page = options.output.read_text()
    assert "failed" not in page
    assert "WRONG" not in page
    assert page.count("| ok |") == 2 * len(methods)
    for case in ("PEFT, LoRA", *gpu_check.STEPS, "loraloom, 4 MixLoRAs", "not installed"):
        assert f"| {case} |" in page


def test_a_part_that_fails_is_reported_and_the_others_go_on(tmp_path):
    def run(part, options):
        if part == "training":
            raise MemoryError("no room\nleft")
        return [{"part": part}]

    options = Namespace(device="cpu", output=tmp_path / "page.md", size=None, steps=1)
    gpu_check.write_page(options, run)
    page = options.output.read_text()
    assert "A trial on the CPU" in page
    assert "| MemoryError: no room left |" in page
    assert "| vllm |" in page
