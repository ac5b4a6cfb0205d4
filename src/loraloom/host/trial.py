"""Whether adapters compute right on a base model whose type no test knows.

A layer is known by the names that its linear modules usually have. Names only suggest what a model
computes, so a host tries one whose type is not in `FAMILIES` on a few tokens before it takes it: a
LoRA on attention, and one on the FFN blocks, must give the logits that PEFT's would, those of the
base model with `s·B(Ax)` added to each linear layer's output; a mixture whose experts do nothing
must leave the logits as they are; hidden states through the head must give the logits, and so must
a forward in two steps with a cache.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.adapters import TRIALS
from loraloom.adapters.contract import Adapter
from loraloom.base.blocks import BaseProjection
from loraloom.base.structure import expert_modules, unsupported
from loraloom.errors import LoraloomError, ModelError, shown

_ROWS, _LENGTH, _READ_FIRST = 2, 8, 5
# Most relative error of logits in float32.
_EXACT = 1e-5
# Most in 16 bits, or where weights have fewer; a wrong block is off by about 1. Of 232 small random
# mixtures of 17 types in bfloat16, the largest error is 0.14.
_ROUNDED = 0.25
# Of B's numbers: with it an update is about as large as the projection's own output.
_STD = 0.3
_NAME = "trial"


def try_attention(host: Any) -> None:
    """Compare attention that is neither sdpa nor eager with eager, on rows of two lengths."""
    implementation = host.config._attn_implementation
    if implementation in ("sdpa", "eager") or host.device.type == "meta":
        return
    ids = _draw_ids(host)
    mask = torch.ones_like(ids)
    mask[0, : _LENGTH // 2] = 0

    def real_logits() -> Tensor:
        return host.model(input_ids=ids, attention_mask=mask).logits[mask.bool()]

    with torch.no_grad(), _held_routes(host, _ROWS):
        actual = real_logits()
        host.model.set_attn_implementation("eager")
        try:
            expected = real_logits()
        finally:
            host.model.set_attn_implementation(implementation)
    _compare(host, f"attention by {implementation}", actual, expected)


def _draw_ids(host: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(host.config.vocab_size, 1000), (_ROWS, _LENGTH), generator=generator)
    return ids.to(host.device)


def try_adapters(host: Any) -> None:
    """Try a host's base model with adapters; one without weights (on meta) is left alone."""
    if host.device.type == "meta":
        return
    try:
        with torch.no_grad(), _held_routes(host, _ROWS):
            _try_on(host, _draw_ids(host))
    except LoraloomError:
        raise
    # Whatever a foreign model raises.
    except Exception as error:
        reason = f"a forward with adapters fails: {type(error).__name__}: {error}"
        raise unsupported(host.model, reason) from error


def _try_on(host: Any, ids: Tensor) -> None:
    logits = host.model(input_ids=ids).logits
    scaled = host.logits(host.hidden(ids).last_hidden_state)
    _compare(host, "its head's logits, scaled as its config says", scaled, logits)
    kinds = {block.kind for block in host.base.blocks}
    for part, config in TRIALS.items():
        if part not in kinds and not (part == "mixture" and "ffn" in kinds):
            continue
        adapter = host.add(_NAME, config)
        if part == "mixture":
            what, expected = "the FFN block with a mixture that adds nothing", logits
        else:
            what, expected = f"{part} with a LoRA", _expected(host.model, ids, adapter)
        actual = host(ids, adapters=[_NAME] * _ROWS).logits
        host.remove(_NAME)
        _compare(host, what, actual, expected)
    decoded = host.extend(host.prefill(ids[:, :_READ_FIRST]), ids[:, _READ_FIRST:])
    _compare(host, "decoding with a cache", decoded, logits[:, -1])


def _expected(model: Any, ids: Tensor, adapter: Adapter) -> Tensor:
    """Draw an adapter's B, and compute the logits that PEFT's LoRA layers would give."""
    generator = torch.Generator().manual_seed(1)
    tensors, num_calls = adapter.tensors(), Counter[str]()
    for name, tensor in tensors.items():
        if name.endswith("lora_B"):
            tensor.copy_(torch.empty(tensor.shape).normal_(std=_STD, generator=generator))

    def add_update(key: str, _: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return add_update(key, _, args, output[0]), *output[1:]
        num_calls[key] += 1
        A, B = (tensors[f"{key}.lora_{part}"] for part in "AB")
        update = adapter.config.scaling * (args[0].to(A.dtype) @ A.T @ B.T)
        return output + update.to(output.dtype)

    with ExitStack() as hooks:
        for projection in adapter.projections():
            base = projection.base
            if base.num_experts is not None:  # no module's output: the weights are changed
                _put_weight(base, projection.merged(base.weight.dtype), hooks)
                num_calls[projection.key] = 1
                continue
            hook = partial(add_update, projection.key)
            hooks.callback(base.linear.register_forward_hook(hook).remove)
        expected = model(input_ids=ids).logits
    for key in (projection.key for projection in adapter.projections()):
        if num_calls[key] != 1:
            raise unsupported(model, f"{key} computes {num_calls[key]} times in a forward, not 1")
    return expected


def _put_weight(base: BaseProjection, weight: Tensor, undo: ExitStack) -> None:
    """Let the base model compute with another weight."""
    if base.quantized is None:
        undo.callback(base.set_weight, base.weight.clone())
        base.set_weight(weight)
    else:  # the base model reads a stack from this module
        undo.callback(vars(base.quantized.linear).pop, "forward")
        base.quantized.linear.forward = partial(base.as_stored, weight)


class PackingTrial:
    """Whether samples of a packed row see each other; tried once with each kind of attention."""

    def __init__(self, host: Any):
        self._host = host
        self._sound: set[str] = set()  # implementations of attention

    def check(self) -> None:
        """Raise a ModelError if samples of a packed row would see each other."""
        implementation = self._host.config._attn_implementation
        if implementation not in self._sound:
            with self._host.forwards.without_adapters():
                _try_packing(self._host)
            self._sound.add(implementation)


@torch.inference_mode(False)
@torch.enable_grad()
def _try_packing(host: Any) -> None:
    """Run a sample twice in one row of a host's base model; both must be as if they were alone.

    The second one's states must equal the first one's, whatever precedes it, and their gradient for
    the first one's embeddings must be exactly 0, in any dtype.
    """
    if host.device.type == "meta":
        return
    generator = torch.Generator().manual_seed(0)
    sample = torch.randint(min(host.config.vocab_size, 1000), (1, _LENGTH), generator=generator)
    positions = torch.arange(_LENGTH).expand(1, _LENGTH)
    embeddings: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1]

    def run(copies: int) -> Any:
        return host.forwards.run_decoder(
            input_ids=sample.repeat(1, copies).to(host.device),
            position_ids=positions.repeat(1, copies).to(host.device),
            use_cache=False,
        )

    with _held_routes(host, 1) as routes:
        if routes:
            run(copies=1)
        hook = host.model.get_input_embeddings().register_forward_hook(keep)
        try:
            output = run(copies=2)
        finally:
            hook.remove()
    first, second = output.last_hidden_state.split(_LENGTH, dim=1)
    weights = torch.randn(second.shape, generator=generator)  # the sum after a norm may be constant
    (gradient,) = torch.autograd.grad((second * weights.to(second)).sum(), embeddings)
    is_apart = not gradient[:, :_LENGTH].any()
    if not (is_apart and _relative_error(second.detach(), first.detach()) <= _max_error(host)):
        raise ModelError(
            "packing requires a base model in which the samples of a row don't see each other, but "
            f"in {shown(host.base.model_type)} (attn_implementation "
            f"{host.config._attn_implementation}) they do; set packing: false and "
            "group_by_length: true"
        )


class _HeldRoute:
    """A pre-hook of a module of experts that sends tokens where they went in its first call.

    What is compared differs in its last bits, and in 16 bits these decide between experts whose
    router logits are nearly equal; outputs would then differ by whole experts.
    """

    def __init__(self, num_rows: int):
        self._num_rows = num_rows
        self._first: tuple[Tensor, Tensor] | None = None  # of the first call, (B, L, K) each
        self._num_read = 0  # tokens of a row, over all calls

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_states, index, weights = args
        if self._first is None:
            self._first = self._by_row(index.detach()), self._by_row(weights.detach())
            return args
        first_index, first_weights = self._first
        length = len(index) // self._num_rows
        positions = torch.arange(self._num_read, self._num_read + length) % first_index.shape[1]
        self._num_read += length
        positions = positions.to(index.device)
        index = first_index[:, positions].flatten(0, 1)
        return hidden_states, index, first_weights[:, positions].flatten(0, 1)

    def _by_row(self, values: Tensor) -> Tensor:
        return values.unflatten(0, (self._num_rows, -1))


@contextmanager
def _held_routes(host: Any, num_rows: int) -> Iterator[list[_HeldRoute]]:
    """Send the tokens of some rows to the experts of a first forward, in it and in all later ones.

    Later forwards read the rows from their first token on, in one piece or in several.
    """
    routes = list[_HeldRoute]()
    with ExitStack() as hooks:
        for _, _, module in expert_modules(host.model, host.base):
            routes.append(_HeldRoute(num_rows))
            hooks.callback(module.register_forward_pre_hook(routes[-1]).remove)
        yield routes


def _max_error(host: Any) -> float:
    exact = host.dtype == torch.float32 and host.base.quantization is None
    return _EXACT if exact or host.dtype == torch.float64 else _ROUNDED


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    expected = expected.cpu().double()
    return float((actual.cpu().double() - expected).norm() / expected.norm())


def _compare(host: Any, what: str, actual: Tensor, expected: Tensor) -> None:
    most, error = _max_error(host), _relative_error(actual, expected)
    if not error <= most:
        raise unsupported(
            host.model,
            f"{what} must equal what the model computes within {most:g}, the error is {error:.2g}",
        )
