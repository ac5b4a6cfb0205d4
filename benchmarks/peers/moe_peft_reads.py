"""MoE-PEFT 2.0.2 reads adapters that loraloom has written: do its logits stay what they were?

FIXTURES holds checkpoints that MoE-PEFT wrote (`CASE/adapter`), the logits it gave with them
(`CASE/expected.safetensors`: `input_ids`, `logits`) and their bases (`FAMILY/base`). They go
through loraloom first:

    for case in llama-mixlora llama-mola llama-loramoe llama-lora qwen2-mixlora phi-mixlora; do
        loraloom convert FIXTURES/$case/adapter OUT/$case --to reference
    done
    .peers/bin/python benchmarks/peers/moe_peft_reads.py FIXTURES OUT

See README.md for MoE-PEFT's own environment. It drops at inference too, so dropout is taken out.
"""

import argparse
from pathlib import Path

import moe_peft
import moe_peft.adapters
import torch
from moe_peft.common import LLMBatchConfig, LLMModelInput
from safetensors.torch import load_file


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("fixtures", type=Path, help="with the bases and the expected logits")
    parser.add_argument("converted", type=Path, help="with an adapter for each case")
    args = parser.parse_args()
    torch.nn.functional.dropout = lambda values, *_, **__: values.clone()
    worst = 0.0
    for adapter in sorted(args.converted.iterdir()):
        expected = load_file(args.fixtures / adapter.name / "expected.safetensors")
        base = args.fixtures / adapter.name.partition("-")[0] / "base"
        differences = [difference(base, adapter, expected, batch) for batch in ("", "padded.")]
        worst = max(worst, *differences)
        print(f"{adapter.name}: logits differ by {max(differences):.2g} at most")
    assert worst < 1e-4


@torch.no_grad()
def difference(base: Path, adapter: Path, expected: dict[str, torch.Tensor], batch: str) -> float:
    model = moe_peft.LLMModel.from_pretrained(
        str(base), device="cpu", load_dtype=torch.float32, attn_impl="eager"
    )
    model.load_adapter(str(adapter), "a")
    ids = expected[f"{batch}input_ids"]
    mask = expected.get(f"{batch}attention_mask", torch.ones_like(ids)).bool()
    inputs = LLMModelInput(
        batch_configs_=[LLMBatchConfig("a", 0, len(ids))],
        batch_tokens_=ids.tolist(),
        batch_masks_=mask.long().tolist(),
        inference_mode_=True,
    )
    logits = model.forward(inputs)[0].logits
    return float((logits - expected[f"{batch}logits"])[mask].abs().max())


if __name__ == "__main__":
    main()
