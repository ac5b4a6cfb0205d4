"""A training step of MoE-PEFT 2.0.2 with one MixLoRA adapter: median seconds and peak memory.

The setting of `loraloom bench step`: 4 x 256 tokens, rank 8 on all linear layers, 8 experts, top-2,
loss on all tokens, AdamW. MoE-PEFT refuses dropout 0, so it is 0.05. See README.md for its own
environment.

    python benchmarks/peers/moe_peft_step.py MODEL_DIRECTORY
"""

import statistics
import sys
import time
from pathlib import Path

import moe_peft
import moe_peft.adapters
import torch
from moe_peft.common import LLMBatchConfig, LLMModelInput
from torch.nn.functional import cross_entropy

ROWS, LENGTH, STEPS = 4, 256, 6
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main(directory: str) -> None:
    torch.set_num_threads(2)
    model = moe_peft.LLMModel.from_pretrained(
        directory, device="cpu", load_dtype=torch.bfloat16, attn_impl="eager"
    )
    config = moe_peft.adapter_factory(
        peft_type="MIXLORA",
        adapter_name="mixture",
        r=8,
        lora_alpha=16,
        lora_dropout=0.05,
        target_modules=TARGETS,
        routing_strategy="mixlora",
        num_experts=8,
        top_k=2,
    )
    model.init_adapter(config)
    trained = list(model.get_adapter_weight_dict("mixture").values())
    optimizer = torch.optim.AdamW([weight.requires_grad_() for weight in trained], lr=1e-4)
    tokens = torch.randint(3, 40000, (ROWS, LENGTH))
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    seconds = [step(model, optimizer, tokens) for _ in range(STEPS)]
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]
    print(f"median {statistics.median(seconds[1:]):.2f} s, peak {int(peak) / 1e6:.2f} GB")


def step(model, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> float:
    start = time.perf_counter()
    (output,) = model.forward(batch(tokens))
    logits = output.logits[:, :-1].flatten(0, 1).float()
    loss = cross_entropy(logits, tokens[:, 1:].flatten()) + output.aux_loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def batch(tokens: torch.Tensor) -> LLMModelInput:
    rows = tokens.tolist()
    return LLMModelInput(
        batch_configs_=[
            LLMBatchConfig(adapter_name_="mixture", batch_start_idx_=0, batch_end_idx_=len(rows))
        ],
        batch_tokens_=rows,
        batch_labels_=[list(row) for row in rows],
        batch_masks_=[[1] * LENGTH for _ in rows],
        gradient_checkpoint_="none",
        efficient_operator_=True,
        inference_mode_=False,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
