"""Does a base model that is in no table compute with adapters what it should? Tried on few tokens.

A LoRA on attention, and one on the FFN blocks, must give the logits that PEFT's would: those of the
base model with `s·B(Ax)` added to each linear layer's output. A mixture whose experts do nothing
must leave the logits as they are. Hidden states through the head must give the logits, and so must
a forward in two steps with a cache.

Axes: B rows, L tokens of a row, I in_features, O out_features, R rank, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loraloom.adapters import TRIALS
from loraloom.adapters.adapter import Adapter
from loraloom.adapters.config import AdapterConfig
from loraloom.errors import LoraloomError, ModelError
from loraloom.models.structure import unsupported

if TYPE_CHECKING:
    from loraloom.models.host import Host

_ROWS, _LENGTH, _READ_FIRST = 2, 8, 5
_EXACT = 1e-5
"""Most relative error of logits in float32."""
_ROUNDED = 0.1
"""Most in 16 bits, or where weights have fewer; a wrong block is off by about 1."""
_STD = 0.3
"""Of B's numbers: with it an update is about as large as the projection's own output."""
_NAME = "trial"


def try_adapters(host: Host) -> None:
    """Try a base model with adapters; one without weights (on the meta device) is left alone."""
    if host.device.type == "meta":
        return
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(host.config.vocab_size, 1000), (_ROWS, _LENGTH), generator=generator)
    trial = _Trial(host, ids.to(host.device))
    with torch.no_grad(), trial.failing_as_unsupported():
        trial.run()


class _Trial:
    """A host and the tokens that it is tried on, [B, L]."""

    def __init__(self, host: Host, ids: Tensor):
        self.host = host
        self.ids = ids
        exact = host.dtype == torch.float32 and host.base.quantization is None
        self.most = _EXACT if exact or host.dtype == torch.float64 else _ROUNDED

    @contextmanager
    def failing_as_unsupported(self) -> Iterator[None]:
        """Tell whatever a foreign model raises as a model that isn't supported."""
        try:
            yield
        except LoraloomError:
            raise
        except Exception as error:
            reason = f"a forward with adapters fails: {type(error).__name__}: {error}"
            raise unsupported(self.host.model, reason) from error

    def run(self) -> None:
        """Try everything."""
        logits = self._bare()
        states = self.host.hidden(self.ids).last_hidden_state
        self._compare(
            "its head's logits, scaled as its config says", self.host.logits(states), logits
        )
        for part, config in TRIALS.items():
            if part != "attention" and not self.host.base.ffn_projections:
                continue
            if part == "mixture":
                self._try_mixture(config, logits)
            else:
                self._try_updates(part, config)
        session = self.host.prefill(self.ids[:, :_READ_FIRST])
        decoded = self.host.extend(session, self.ids[:, _READ_FIRST:])
        self._compare("decoding with a cache", decoded, logits[:, -1])

    def _bare(self) -> Tensor:
        return self.host.model(input_ids=self.ids).logits

    def _try_updates(self, part: str, config: AdapterConfig) -> None:
        adapter = self.host.add(_NAME, config)
        generator = torch.Generator().manual_seed(1)
        tensors = adapter.tensors()
        for name, tensor in tensors.items():
            if name.endswith("lora_B"):
                tensor.copy_(torch.empty(tensor.shape).normal_(std=_STD, generator=generator))
        with _plain_updates(adapter, tensors) as updates:
            expected = self._bare()
        actual = self.host(self.ids, adapters=[_NAME] * _ROWS).logits
        self.host.remove(_NAME)
        for key, update in updates.items():
            if update.num_calls != 1:
                raise self._differs(f"{key} computes {update.num_calls} times in a forward, not 1")
        self._compare(f"{part} with a LoRA", actual, expected)

    def _try_mixture(self, config: AdapterConfig, logits: Tensor) -> None:
        self.host.add(_NAME, config)
        actual = self.host(self.ids, adapters=[_NAME] * _ROWS).logits
        self.host.remove(_NAME)
        self._compare("the FFN block with a mixture that adds nothing", actual, logits)

    def _compare(self, what: str, actual: Tensor, expected: Tensor) -> None:
        wanted = expected.double()
        error = float((actual.double() - wanted).norm() / wanted.norm())
        if not error <= self.most:
            raise self._differs(
                f"{what} must be what the model itself computes within {self.most:g}, it is off by "
                f"{error:.2g}"
            )

    def _differs(self, reason: str) -> ModelError:
        return unsupported(self.host.model, reason)


class _PlainUpdate:
    """A forward hook on a linear layer, y + s·B(Ax): what PEFT's LoRA layer computes."""

    def __init__(self, lora_A: Tensor, lora_B: Tensor, scaling: float):
        self.lora_A = lora_A
        self.lora_B = lora_B
        self.scaling = scaling
        self.num_calls = 0

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        self.num_calls += 1
        update = args[0].to(self.lora_A.dtype) @ self.lora_A.T @ self.lora_B.T
        return output + (self.scaling * update).to(output.dtype)


@contextmanager
def _plain_updates(
    adapter: Adapter, tensors: Mapping[str, Tensor]
) -> Iterator[dict[str, _PlainUpdate]]:
    """Put an adapter's updates on the base model's linear layers, by their keys, for a while."""
    scaling: Any = adapter.config.description()["scaling"]
    projections = {
        projection.key: projection
        for layer in adapter.base_layers
        for block in layer.blocks.values()
        for projection in block.values()
        if f"{projection.key}.lora_A" in tensors
    }
    updates = {
        key: _PlainUpdate(tensors[f"{key}.lora_A"], tensors[f"{key}.lora_B"], scaling)
        for key in projections
    }
    handles = [
        projections[key].linear.register_forward_hook(update) for key, update in updates.items()
    ]
    try:
        yield updates
    finally:
        for handle in handles:
            handle.remove()
