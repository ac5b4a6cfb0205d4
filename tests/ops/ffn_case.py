"""One FFN block with random weights, and its output by a dense loop.

Axes: T tokens, D hidden, F feed-forward, E experts, R rank, K top_k.

The loop materialises `W + s·B_e·A_e` and goes through tokens and slots. It shares nothing with the
code that it judges but the masks of dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import silu

from loraloom.ops.dropout import DrawMask
from loraloom.ops.expert_ffn import FfnDropout, FfnWeights, Routing
from loraloom.ops.gating import ActivationGating
from loraloom.ops.low_rank import UpProjection

D, F, R = 5, 6, 2
SCALING = 0.75
SHAPES: dict[str, tuple[str, ...]] = {
    "gated": ("gate", "up", "down"),
    "ungated": ("gate", "down"),
    "fused": ("gate_up", "down"),
}
GATINGS = {
    "gated": ActivationGating(silu),
    "ungated": ActivationGating(silu),
    "fused": ActivationGating(silu, is_fused=True),
}
FfnFunction = Callable[..., tuple[Tensor, Callable[[Tensor], Tensor]]]


@dataclass
class FfnCase:
    """Base weights, experts, tokens and routing; `leaves` are the tensors that get gradients.

    DoRA's norms, by the dense product, are constants as in the method.
    """

    shape: str
    base: dict[str, Tensor]
    bias: dict[str, Tensor]
    leaves: dict[str, Tensor]
    selected: Tensor
    dropout: FfnDropout
    num_experts: int
    norms: dict[str, Tensor]

    @property
    def adapted(self) -> list[str]:
        return [name for name in SHAPES[self.shape] if f"{name}.A" in self.leaves]

    @property
    def rank(self) -> int:
        return self.leaves[f"{self.adapted[0]}.A"].shape[1]

    @property
    def routing_weights(self) -> Tensor:
        """g: positive, summing to one over slots; at padding all on the first slot."""
        weights = self.leaves["slot_logits"].softmax(-1)
        first = torch.zeros_like(weights)
        first[:, 0] = 1
        return torch.where(self.selected[:, :1] >= 0, weights, first)

    def to(self, dtype: torch.dtype, device: str = "cpu") -> FfnCase:
        """The same block there; what decides weights of slots and norms stays in float32."""

        def there(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            exact = [name for name in tensors if name == "slot_logits" or name.endswith(".m")]
            return {
                name: tensor.detach().to(device, torch.float32 if name in exact else dtype)
                for name, tensor in tensors.items()
            }

        draws = (self.dropout.keep_input, *self.dropout.keep_slots)
        keep_input, *keep_slots = [
            None if draw is None else constant(draw().to(device, dtype)) for draw in draws
        ]
        return replace(
            self,
            base=there(self.base),
            bias=there(self.bias),
            leaves={name: leaf.requires_grad_() for name, leaf in there(self.leaves).items()},
            norms={name: norm.to(device, torch.float32) for name, norm in self.norms.items()},
            selected=self.selected.to(device),
            dropout=replace(self.dropout, keep_input=keep_input, keep_slots=keep_slots),
        )


def make_case(
    shape: str,
    *,
    top_k: int = 2,
    num_experts: int = 4,
    num_tokens: int = 5,
    targets: Sequence[str] | None = None,
    dropout: float = 0.0,
    padding: Sequence[int] = (),
    decomposed: bool = False,
    features: int = F,
    rank: int = R,
) -> FfnCase:
    torch.manual_seed(0)
    sizes = dict.fromkeys(("gate", "up"), (features, D))
    sizes |= {"gate_up": (2 * features, D), "down": (D, features)}
    names = SHAPES[shape]
    leaves = {"x": leaf(num_tokens, D), "slot_logits": leaf(num_tokens, top_k)}
    for name in targets or names:
        out_features, in_features = sizes[name]
        leaves[f"{name}.A"] = leaf(num_experts, rank, in_features)
        leaves[f"{name}.B"] = leaf(num_experts, out_features, rank)
        if decomposed:
            leaves[f"{name}.m"] = leaf(num_experts, out_features)
    selected = torch.rand(num_tokens, num_experts).topk(top_k).indices
    selected[list(padding)] = -1
    base = {name: torch.randn(sizes[name], dtype=torch.float64) for name in names}
    norms = {
        name: (base[name] + SCALING * leaves[f"{name}.B"] @ leaves[f"{name}.A"]).norm(dim=-1)
        for name in names
        if f"{name}.m" in leaves
    }
    return FfnCase(
        shape=shape,
        base=base,
        bias={name: torch.randn(sizes[name][0], dtype=torch.float64) for name in names},
        leaves=leaves,
        selected=selected,
        dropout=_masks(dropout, num_tokens, top_k, features),
        num_experts=num_experts,
        norms={name: values.detach() for name, values in norms.items()},
    )


def run(ffn: FfnFunction, case: FfnCase) -> Tensor:
    """Compute the block's output with the code that ships, around the base's own products."""
    x, weights = case.leaves["x"], compute_form(case)
    outputs = [_base(case, name, x) for name in SHAPES[case.shape][:-1]]
    routing = Routing(case.selected, case.routing_weights)
    hidden, finish = ffn(x, outputs, weights, routing, GATINGS[case.shape], case.dropout)
    return finish(_base(case, "down", hidden))


def dense_loop(case: FfnCase) -> Tensor:
    """Compute the block's output token by token and slot by slot."""
    return torch.stack([_token(case, token) for token in range(len(case.selected))])


def with_gradients(output: Tensor, case: FfnCase) -> list[Tensor]:
    """The output, and the gradients of all leaves where no two numbers of it count the same."""
    upstream = torch.linspace(-1, 2, output.numel(), dtype=output.dtype, device=output.device)
    leaves, loss = list(case.leaves.values()), (output * upstream.view_as(output)).sum()
    return [output.detach(), *torch.autograd.grad(loss, leaves, materialize_grads=True)]


def assert_equals_loop(
    ffn: FfnFunction, case: FfnCase, tolerance: float = 1e-10, dtype: torch.dtype | None = None
) -> None:
    """Output and gradients of every leaf, in the case's or another dtype, are the dense loop's."""
    ours = case if dtype is None else case.to(dtype)
    results = with_gradients(run(ffn, ours), ours), with_gradients(dense_loop(case), case)
    for own, expected, name in zip(*results, ["output", *case.leaves], strict=True):
        torch.testing.assert_close(
            own.double(),
            expected,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, n=name: f"{n}: {text}",
        )


def compute_form(case: FfnCase) -> FfnWeights:
    """Concatenate experts along the rank, as `adapters` does."""
    leaves = case.leaves
    present = [name for name in SHAPES[case.shape][:-1] if name in case.adapted]
    size, sides, stacked = case.num_experts * case.rank, {}, []
    for position, name in enumerate(present):
        columns = slice(position * size, (position + 1) * size)
        stacked.append(leaves[f"{name}.A"].flatten(0, 1))
        lora_B = _compute_B(leaves[f"{name}.B"])
        sides[name] = UpProjection(columns, lora_B, row_scale(case, name), case.bias[name])
    down_A = down = None
    if "down" in case.adapted:
        down_A, down_B = leaves["down.A"].flatten(0, 1), _compute_B(leaves["down.B"])
        scale, bias = row_scale(case, "down"), case.bias["down"]
        down = UpProjection(slice(0, size), down_B, scale, bias)
    return FfnWeights(
        input_A=torch.cat(stacked) if stacked else None,
        inputs=[sides.get(name) for name in SHAPES[case.shape][:-1]],
        down_A=down_A,
        down=down,
        num_experts=case.num_experts,
        rank=case.rank,
        width=case.base["down"].shape[1],
    )


def row_scale(case: FfnCase, name: str) -> Tensor | None:
    """DoRA's c = m / ‖W + sBA‖, [E, O]."""
    magnitude = case.leaves.get(f"{name}.m")
    return None if magnitude is None else magnitude / case.norms[name]


def _token(case: FfnCase, token: int) -> Tensor:
    x, dropout = case.leaves["x"][token], case.dropout
    total = torch.zeros(D, dtype=torch.float64)
    for slot, expert in enumerate(case.selected[token].tolist()):
        dropped = _drop(x, dropout.keep_input, token, dropout.probability)
        if case.shape == "fused":
            gate, up = _linear(case, "gate_up", expert, x, dropped).chunk(2)
        else:
            gate = _linear(case, "gate", expert, x, dropped)
            up = _linear(case, "up", expert, x, dropped) if case.shape == "gated" else 1
        hidden = silu(gate) * up
        dropped = _drop(hidden, dropout.keep_slots[slot], token, dropout.probability)
        output = _linear(case, "down", expert, hidden, dropped)
        total = total + case.routing_weights[token, slot] * output
    return total


def _linear(case: FfnCase, name: str, expert: int, x: Tensor, dropped: Tensor) -> Tensor:
    weight, bias = case.base[name], case.bias[name]
    if expert < 0 or name not in case.adapted:
        return weight @ x + bias
    update = SCALING * case.leaves[f"{name}.B"][expert] @ case.leaves[f"{name}.A"][expert]
    scale = row_scale(case, name)
    factor = 1 if scale is None else scale[expert]
    return factor * (weight @ x + update @ dropped) + bias


def _drop(values: Tensor, keep: DrawMask | None, token: int, probability: float) -> Tensor:
    return values if keep is None else values * keep()[token] / (1 - probability)


def _base(case: FfnCase, name: str, x: Tensor) -> Tensor:
    return x @ case.base[name].T + case.bias[name]


def _compute_B(lora_B: Tensor) -> Tensor:
    return (SCALING * lora_B).transpose(1, 2).flatten(0, 1)


def _masks(dropout: float, num_tokens: int, top_k: int, features: int) -> FfnDropout:
    if dropout == 0:
        return FfnDropout.none(top_k)
    keep_slots = [
        constant((torch.rand(num_tokens, features) > dropout).double()) for _ in range(top_k)
    ]
    keep_input = constant((torch.rand(num_tokens, D) > dropout).double())
    return FfnDropout(dropout, keep_input, keep_slots)


def constant(mask: Tensor) -> DrawMask:
    """Return a function that draws this mask."""
    return lambda: mask


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)
