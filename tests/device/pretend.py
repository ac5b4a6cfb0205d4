"""A pretend accelerator: a device whose tensors have their numbers in CPU tensors inside.

    with pretend() as log:  # `torch.accelerator` names it
        model.to(log.device)
        with log.step("train"):
            ...
    log.waits("train")

It computes real numbers, raises where CUDA does (a device's tensor with a CPU tensor of one
dimension or more), and notes each wait for the device with the line of loraloom that asks for it.
A copy to a device waits as well: CUDA's blocking copy follows it by cudaStreamSynchronize.

The name of the device can't be taken back in a process, so tests on it run apart from others.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import FrameType, ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"aten::_local_scalar_dense", "aten::item"}
# CUDA's kernels wait where the size of the result, or an error, depends on numbers.
WAITING = READS | {
    f"aten::{name}"
    for name in (
        "nonzero masked_select equal _unique _unique2 unique_dim unique_consecutive is_nonzero "
        "bincount histc multinomial argwhere _linalg_svd _linalg_eigh linalg_qr _linalg_solve_ex"
    ).split()
}
# CUDA accepts indices on the CPU, and copies them.
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
COPYING = {"aten::copy_", "aten::_to_copy", "aten::_copy_from", "aten::to"}


class PretendError(RuntimeError):
    """An operation that CUDA would refuse."""


@dataclass(frozen=True)
class Wait:
    kind: str  # read, sync or upload
    operation: str
    line: str  # the innermost line of loraloom


@dataclass
class Log:
    """The waits for the device, by step."""

    device: torch.device
    by_step: dict[str, list[Wait]] = field(default_factory=dict)
    current: list[Wait] = field(default_factory=list)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Note waits under a name."""
        outer = self.current
        self.current = self.by_step.setdefault(name, [])
        try:
            yield
        finally:
            self.current = outer

    def note(self, kind: str, operation: str) -> None:
        self.current.append(Wait(kind, operation, _line_of_loraloom(sys._getframe(1))))

    def counts(self, name: str) -> dict[str, int]:
        """Count a step's waits by their kind."""
        return dict(Counter(wait.kind for wait in self.by_step[name]))

    def waits(self, name: str) -> Counter[Wait]:
        """Count a step's waits by their kind, operation and line."""
        return Counter(self.by_step[name])


def _line_of_loraloom(frame: FrameType | None) -> str:
    while frame is not None:
        path = frame.f_code.co_filename
        if "/src/loraloom/" in path:
            return f"{path.rpartition('/src/loraloom/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "-"


_current: Log | None = None


def _log() -> Log:
    assert _current is not None, "the device is there within `with pretend():`"
    return _current


class PretendTensor(torch.Tensor):
    """A tensor on the device; `inner` has its numbers."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=_log().device,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    @property
    def data(self):
        return PretendTensor(self.inner)  # with another version counter

    @data.setter
    def data(self, value):
        if not isinstance(value, PretendTensor):
            raise PretendError("a device's tensor can't take a CPU tensor's data")
        torch.Tensor.data.__set__(self, value)
        self.inner = value.inner

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __deepcopy__(self, memo):
        with torch.no_grad():
            made = PretendTensor(self.inner.clone()).requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            made = torch.nn.Parameter(made.detach(), self.requires_grad)
        memo[id(self)] = made
        return made

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"pretend({self.inner})"

    def __reduce_ex__(self, protocol):
        _log().note("read", "torch.save")  # the file gets a CPU tensor
        return self.inner.detach().requires_grad_(self.requires_grad).__reduce_ex__(protocol)


def on_cpu(tree: Any) -> Any:
    """Take numbers out without a note, for comparisons."""
    return _map(_unwrapped, tree)


def _map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to what an operation takes or returns, several times as fast as pytree."""
    if isinstance(tree, (list, tuple)):
        return type(tree)([_map(function, item) for item in tree])
    if isinstance(tree, dict):
        return {name: _map(function, item) for name, item in tree.items()}
    return function(tree)


def _unwrapped(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, PretendTensor) else leaf


def _is_ours(device: Any) -> bool:
    return device is not None and torch.device(device).type == _log().device.type


def _run(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Check an operation, note whether it waits, and compute it on the CPU."""
    name = function._schema.name
    leaves: list[Any] = []
    _map(leaves.append, (args, kwargs))
    ours = [leaf for leaf in leaves if isinstance(leaf, PretendTensor)]
    device = kwargs.get("device")
    makes_ours = bool(ours) if device is None else _is_ours(device)
    if not ours and not makes_ours:
        return function(*args, **kwargs)
    if ours and name not in COPYING:
        _check_devices(name, args, leaves)
    _note_waits(name, args, kwargs, bool(ours), makes_ours)
    if name == "aten::_fused_sdp_choice":
        return 0  # the formula, which all devices have
    result = function(*_map(_plain, args), **_map(_plain, kwargs))
    if name == "aten::copy_" and not isinstance(args[0], PretendTensor):
        return args[0]  # a CPU tensor took a device's numbers
    return _wrap(result, ours, makes_ours)


def _plain(leaf: Any) -> Any:
    is_device = isinstance(leaf, torch.device) and _is_ours(leaf)
    return torch.device("cpu") if is_device else _unwrapped(leaf)


def _wrap(result: Any, ours: Sequence[PretendTensor], makes_ours: bool) -> Any:
    by_inner = {id(tensor.inner): tensor for tensor in ours}

    def wrapped(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or isinstance(leaf, PretendTensor):
            return leaf
        if id(leaf) in by_inner:  # changed in place
            return by_inner[id(leaf)]
        return PretendTensor(leaf) if makes_ours else leaf

    return _map(wrapped, result)


def _check_devices(name: str, args: Sequence[Any], leaves: Sequence[Any]) -> None:
    """Raise if a CPU tensor of one dimension or more meets a device's."""
    others = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, PretendTensor)]
    if name in INDEXING and isinstance(args[0], PretendTensor):
        indices = [id(index) for index in args[1]]
        others = [tensor for tensor in others if id(tensor) not in indices]
    joins = name in ("aten::cat", "aten::stack")
    first = args[0][0] if name.startswith("aten::_foreach") else args[0]
    changes_cpu = name.endswith("_") and not isinstance(first, PretendTensor)
    if changes_cpu or any(tensor.dim() > 0 or joins for tensor in others):
        raise PretendError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{_log().device} and cpu! ({name})"
        )


def _note_waits(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], from_ours: bool, to_ours: bool
) -> None:
    if name in WAITING and from_ours:
        _log().note("read" if name in READS else "sync", name)
    elif name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
        _log().note("sync", name)
    elif name in INDEXING:
        for index in args[1]:
            if isinstance(index, Tensor) and not isinstance(index, PretendTensor):
                _log().note("upload", f"{name} by CPU indices")
            elif isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                _log().note("sync", f"{name} by a mask")
    elif name in ("aten::_to_copy", "aten::copy_"):
        if name == "aten::copy_":
            to_ours, from_ours = (isinstance(tensor, PretendTensor) for tensor in args[:2])
        if from_ours != to_ours:
            _log().note("read" if from_ours else "upload", name)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Makes tensors of lists on the CPU first, as torch does where it can't be seen."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if name in ("tensor", "as_tensor", "asarray") and _is_ours(kwargs.get("device")):
            device = kwargs.pop("device")
            requires_grad = kwargs.pop("requires_grad", False)
            return function(*args, **kwargs).to(device).requires_grad_(requires_grad)
        if not args or not isinstance(args[0], PretendTensor):
            return function(*args, **kwargs)
        tensor = args[0]
        if name == "new_tensor":
            device = kwargs.pop("device", tensor.device)
            dtype = kwargs.pop("dtype", tensor.dtype)
            return torch.tensor(*args[1:], dtype=dtype, **kwargs).to(device)
        if name == "__setitem__" and not isinstance(args[2], Tensor):
            _note_number(tensor, args[1])
        if name in ("__getitem__", "__setitem__"):
            return function(tensor, _index(args[1], tensor.device), *args[2:])
        return function(*args, **kwargs)


def _note_number(tensor: Tensor, index: Any) -> None:
    # A number becomes a CPU tensor, which a single element gets by a copy that waits; several
    # elements, as in `x[-1:] = 3`, are filled.
    indices = index if isinstance(index, tuple) else (index,)
    if len(indices) == tensor.dim() and all(isinstance(index, int) for index in indices):
        _log().note("upload", "a number set in one place")


def _index(index: Any, device: torch.device) -> Any:
    if isinstance(index, tuple):
        return tuple(_index(item, device) for item in index)
    if isinstance(index, (list, range)):
        return torch.tensor(list(index)).to(device)
    return index


class _Generator(torch.Generator):
    """Draws the CPU's random numbers, also for the device."""

    def __new__(cls, device: Any = "cpu"):
        return super().__new__(cls, "cpu" if _is_ours(device) else device)

    def __init__(self, device: Any = "cpu"): ...


def _backend() -> ModuleType:
    """Make the module that torch asks about the device."""
    module = ModuleType("torch.pretend")
    functions: dict[str, Callable[..., Any]] = {
        "is_initialized": lambda: True,
        "is_available": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
        "get_device_name": lambda device=None: "a pretend accelerator",
        "mem_get_info": lambda device=None: (80 * 10**9, 80 * 10**9),
    }
    for name, function in functions.items():
        setattr(module, name, function)
    return module


@cache  # a second device can't be registered
def _register() -> list[torch.library.Library]:
    backend_registration._setup_privateuseone_for_python_backend(
        "pretend", backend_module=_backend()
    )
    # Operations arrive here where modes are off, as in a backward pass's thread.
    fallback = torch.library.Library("_", "IMPL", "PrivateUse1")
    fallback.fallback(lambda operation, *args, **kwargs: _run(operation, args, kwargs))
    autocast = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    autocast.fallback(torch.library.fallthrough_kernel)
    return [fallback, autocast]


@contextmanager
def pretend() -> Iterator[Log]:
    """Have the device; its name stays until the process ends."""
    global _current
    _register()
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch, "Generator", _Generator))
        # Torch would ask an allocator in C++.
        stack.enter_context(patch.object(torch.accelerator, "empty_cache", lambda: None))
        for name in ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"):
            stack.enter_context(patch.object(torch.accelerator, name, lambda device=None: 0))
        # A CPU parameter must be replaced: to set its data would leave the numbers there.
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        _current = Log(torch.device("pretend", 0))
        stack.enter_context(_Functions())
        stack.enter_context(_Dispatch())
        try:
            yield _current
        finally:
            _current = None
