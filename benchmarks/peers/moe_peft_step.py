"""A training step of MoE-PEFT 2.0.2 with MixLoRA adapters: median seconds and peak memory.

The setting of `benchmarks/step.py`: 4 x 256 tokens, rank 8 on all linear layers, 8 experts, top-2,
loss on all tokens, AdamW. MoE-PEFT refuses dropout 0, so it is 0.05. See README.md for its own
environment.

    python benchmarks/peers/moe_peft_step.py DIRECTORY --export   # by a Python that has loraloom
    python benchmarks/peers/moe_peft_step.py DIRECTORY [--adapters 4 --rows 2]
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

LENGTH, STEPS = 256, 6
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", help="of the base model")
    parser.add_argument("--adapters", type=int, default=1, help="that share a step")
    parser.add_argument("--rows", type=int, default=4, help="sequences of each adapter")
    parser.add_argument("--export", action="store_true", help="write the base model there")
    args = parser.parse_args()
    if args.export:
        export_base_model(args.directory)
    else:
        measure(args)


def export_base_model(directory: str) -> None:
    """Write SmolLM2-135M as a bfloat16 model directory that transformers 4 reads too."""
    from loraloom import load_base_model

    for part in load_base_model("smollm2-135m", dtype="bfloat16"):
        part.save_pretrained(directory)
    path = Path(directory, "config.json")
    config = json.loads(path.read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]  # where transformers 4 looks
    path.write_text(json.dumps(config, indent=2))


def measure(args: argparse.Namespace) -> None:
    import moe_peft

    torch.set_num_threads(2)
    model = moe_peft.LLMModel.from_pretrained(
        args.directory, device="cpu", load_dtype=torch.bfloat16, attn_impl="eager"
    )
    names = [f"mixture-{number}" for number in range(args.adapters)]
    trained = [weight for name in names for weight in add_mixture(model, name)]
    optimizer = torch.optim.AdamW([weight.requires_grad_() for weight in trained], lr=1e-4)
    tokens = torch.randint(3, 40000, (len(names) * args.rows, LENGTH))
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    seconds = [step(model, optimizer, names, tokens) for _ in range(STEPS)]
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]
    print(f"median {statistics.median(seconds[1:]):.2f} s, peak {int(peak) / 1e6:.2f} GB")


def add_mixture(model, name: str) -> list[torch.Tensor]:
    import moe_peft

    config = moe_peft.adapter_factory(
        peft_type="MIXLORA",
        adapter_name=name,
        r=8,
        lora_alpha=16,
        lora_dropout=0.05,
        target_modules=TARGETS,
        routing_strategy="mixlora",
        num_experts=8,
        top_k=2,
    )
    model.init_adapter(config)
    return list(model.get_adapter_weight_dict(name).values())


def step(model, optimizer: torch.optim.Optimizer, names: list[str], tokens: torch.Tensor) -> float:
    start = time.perf_counter()
    outputs = model.forward(batch(names, tokens))
    losses = [
        loss_of(output, rows)
        for output, rows in zip(outputs, tokens.chunk(len(names)), strict=True)
    ]
    torch.stack(losses).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def loss_of(output, rows: torch.Tensor) -> torch.Tensor:
    logits = output.logits[:, :-1].flatten(0, 1).float()
    return cross_entropy(logits, rows[:, 1:].flatten()) + output.aux_loss


def batch(names: list[str], tokens: torch.Tensor):
    from moe_peft.common import LLMBatchConfig, LLMModelInput

    rows = tokens.tolist()
    share = len(rows) // len(names)
    return LLMModelInput(
        batch_configs_=[
            LLMBatchConfig(
                adapter_name_=name,
                batch_start_idx_=place * share,
                batch_end_idx_=(place + 1) * share,
            )
            for place, name in enumerate(names)
        ],
        batch_tokens_=rows,
        batch_labels_=[list(row) for row in rows],
        batch_masks_=[[1] * LENGTH for _ in rows],
        gradient_checkpoint_="none",
        efficient_operator_=True,
        inference_mode_=False,
    )


if __name__ == "__main__":
    main()
