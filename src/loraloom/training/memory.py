"""Memory of a run before its first step.

The base model is made from its configuration on the meta device, whose branches are those of an
accelerator, and a step runs there on rows as long as the settings allow.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from loraloom.adapters.contract import Adapter
from loraloom.base.loading import build_base_model
from loraloom.base.quantization import predict_weight_bytes
from loraloom.data.tokens import Example, PreferencePair
from loraloom.errors import ConfigError, ModelError
from loraloom.host.host import Host, attach
from loraloom.terminal import show_bytes
from loraloom.training.builder import naming
from loraloom.training.settings import JobConfig, RunConfig
from loraloom.training.step import optimizers
from loraloom.training.step.batch import MicroBatch, Window, lay_out
from loraloom.training.step.fused import add_gradients, gradients_set_aside
from loraloom.training.step.objectives import build_objective, load_reference

aten: Any = torch.ops.aten
_ROUNDING = 512  # bytes, as PyTorch's allocators of accelerators round


class KeptMemory(NamedTuple):
    """What a job keeps between steps."""

    num_trained: int
    adapter_bytes: int
    optimizer_bytes: int  # states, and the copy of the last good weights

    @override
    def __str__(self) -> str:
        sizes = [show_bytes(self.adapter_bytes), show_bytes(self.optimizer_bytes)]
        return f"{self.num_trained:,} trained parameters; adapter {sizes[0]}, optimizer {sizes[1]}"


class RunMemory(NamedTuple):
    """What a run holds at its largest step."""

    jobs: Mapping[str, KeptMemory]
    parts: Mapping[str, int]  # in bytes

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())


def _num_bytes(weights: Iterable[Tensor]) -> int:
    return sum(weight.nbytes for weight in weights)


def kept_memory(job: JobConfig, adapter: Adapter) -> KeptMemory:
    """Count what a job keeps, from a step of its optimizer with another weight."""
    trained = [weight for weight in adapter.parameters() if weight.requires_grad]
    return KeptMemory(
        num_trained=optimizers.count_trained(job.train, adapter),
        adapter_bytes=_num_bytes(adapter.parameters()),
        optimizer_bytes=optimizers.state_bytes(job.train, trained) + _num_bytes(trained),
    )


def predict_memory(run: RunConfig) -> RunMemory:
    """Predict the memory of a run's first jobs in one process, without weights and data."""
    if not run.first_jobs:
        raise ConfigError("a run must set jobs (at least one) or sweep for --dry-run")
    # All kernels but the eager one take the same memory, of which some need a device.
    attention = "eager" if run.attn_implementation == "eager" else None
    model = build_base_model(run.base_model, run.dtype, run.device, attention)
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(
            f"--dry-run does not support quantized checkpoints, got {run.base_model}; pass the "
            "model in floating point, and set quantization"
        )
    weights_bytes = predict_weight_bytes(model, run.quantization)
    host = attach(model)
    kept = {}
    for job in run.first_jobs:
        with naming(job):
            adapter = host.add(job.name, job.adapter)
            optimizers.check_settings(job.train, adapter)
            kept[job.name] = kept_memory(job, adapter)
    batches, num_tokens = _fullest_round(host, run)
    try:
        with _attending_without_data():
            step_bytes = peak_of_round(host, batches)
    except NotImplementedError as error:
        raise ModelError(f"--dry-run does not support {run.base_model}: {error}") from error
    parts = {
        f"base model, {run.quantization or str(host.dtype).removeprefix('torch.')}": weights_bytes,
        "adapters": sum(_num_bytes(adapter.parameters()) for adapter in host.adapters.values()),
        "optimizers": sum(job.optimizer_bytes for job in kept.values()),
        f"gradients and activations, {num_tokens:,} tokens": step_bytes,
    }
    return RunMemory(kept, parts)


def _fullest_round(host: Host, run: RunConfig) -> tuple[list[MicroBatch], int]:
    """Let the jobs with the most tokens take part, and set the host's checkpointing for them."""
    batches: list[MicroBatch] = []
    num_tokens = 0
    checkpointing = False
    turns = [(job, longest_batch(host, job)) for job in run.first_jobs]
    for job, batch in sorted(turns, key=lambda turn: -turn[1].num_tokens):
        num_with_it = sum(lay_out([*batches, batch]).computed_tokens)
        if not batches or num_with_it <= (run.max_tokens_per_step or num_with_it):
            batches.append(batch)
            num_tokens = num_with_it
            checkpointing |= job.train.gradient_checkpointing
    host.enable_gradient_checkpointing(checkpointing)
    return batches, num_tokens


def longest_batch(host: Host, job: JobConfig) -> MicroBatch:
    """Make a micro-batch of examples as long as the settings and the model allow."""
    length = min(job.train.max_length, host.config.max_position_embeddings)
    row = Example((0,) * length, (0,) * length)
    example = PreferencePair(row, row) if job.train.objective.learns_from_pairs else row
    window = Window(0, (example,) * job.train.batch_size, job.train.micro_batch_size)
    rows = window.micro_batch(0)
    return MicroBatch(
        host.adapter(job.name),
        rows,
        range(len(rows)),
        window,
        build_objective(job.train.objective),
        load_reference(host, job.train.objective),
        max_row_length=length if job.train.packing else None,
    )


def peak_of_round(host: Host, batches: Sequence[MicroBatch]) -> int:
    """Return the most bytes that gradients and activations of a round take at once."""
    with LiveStorages(host.device) as storages:
        # From a step's second micro-batch on, there are earlier gradients.
        for _ in range(min(2, max(batch.window.num_micro_batches for batch in batches))):
            with gradients_set_aside([batch.adapter for batch in batches]):
                add_gradients(host, batches, pad_id=0)
    return storages.peak_bytes


class LiveStorages(TorchDispatchMode):
    """Follows the storages that operations make on a device, and their bytes at the peak."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.peak_bytes = 0
        self._device_type = device.type
        self._live: dict[int, int] = {}
        self.live_bytes = 0

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        output = _run(func, args, kwargs)
        for tensor in _tensors(output):
            storage = tensor.untyped_storage()
            is_new = storage._cdata not in inputs and storage._cdata not in self._live
            if is_new and tensor.device.type == self._device_type:
                self._follow(storage)
        return output

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        self._live[key] = -(-storage.nbytes() // _ROUNDING) * _ROUNDING
        self.live_bytes += self._live[key]
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live_bytes -= self._live.pop(key)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation; of tensors without data, numbers are read as 0, and masks as true."""
    source = args[0] if args else None
    if not isinstance(source, Tensor) or not source.is_meta:
        return func(*args, **kwargs)
    is_mask = source.dtype == torch.bool
    if func is aten._local_scalar_dense.default:
        return is_mask
    if func is aten._to_copy.default and torch.device(kwargs.get("device", "meta")).type == "cpu":
        return torch.full(source.shape, is_mask, dtype=kwargs.get("dtype", source.dtype))
    if func is aten._grouped_mm.default:
        return _grouped_product(*args, **kwargs)
    return func(*args, **kwargs)


def _grouped_product(left: Tensor, right: Tensor, stops: Tensor) -> Tensor:
    """Make the output of torch's grouped product, which without data takes bfloat16 alone.

    Rows of groups times a matrix of each are [T, O]; sums over each group's rows are [G, O, I].
    """
    if left.dim() == 2 and right.dim() == 2:
        return left.new_empty(len(stops), left.shape[0], right.shape[1])
    return left.new_empty(left.shape[-2], right.shape[-1])


@contextmanager
def _attending_without_data() -> Iterator[None]:
    """Let attention on the meta device keep no scores, as on devices."""
    attend = functional.scaled_dot_product_attention

    def attend_without_data(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any
    ) -> Tensor:
        options.pop("enable_gqa", None)
        mask = None if attn_mask is None else attn_mask.to(query.dtype)
        flash_attention = aten._scaled_dot_product_flash_attention_for_cpu
        return flash_attention(query, key, value, attn_mask=mask, **options)[0]

    # A mode would not be there when the backward pass computes a checkpointed layer again.
    functional.scaled_dot_product_attention = attend_without_data  # ty: ignore[invalid-assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = attend
