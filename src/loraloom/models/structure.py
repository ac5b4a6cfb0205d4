"""What a model's decoder layers look like, and whether adapters compute right on it.

A layer is known by the names that its linear modules usually have. Names only suggest what a model
computes, so a host tries one whose type is not in `FAMILIES` on a few tokens before it takes it: a
LoRA on attention, and one on the FFN blocks, must give the logits that PEFT's would, those of the
base model with `s·B(Ax)` added to each linear layer's output; a mixture whose experts do nothing
must leave the logits as they are; hidden states through the head must give the logits, and so must
a forward in two steps with a cache.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.adapters import TRIALS
from loraloom.adapters.base import FfnShape
from loraloom.adapters.method import Adapter
from loraloom.errors import LoraloomError, ModelError, shown
from loraloom.models.families import EXPERTS, Family, text_config
from loraloom.models.quantization import is_linear

# Types of models that tests compare with PEFT's layers and with their own blocks.
FAMILIES = tuple(
    "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 olmo2 granite stablelm gpt_neox "
    "smollm3 olmo olmo3 ministral ministral3 ernie4_5 exaone4 hunyuan_v1_dense seed_oss helium "
    "hyperclovax glm glm4 starcoder2 nemotron arcee apertus jais2 cohere cohere2 nanochat lfm2 "
    "qwen3_5_text mixtral qwen2_moe qwen3_moe olmoe gpt_oss gemma3 mistral3".split()
)
_ATTENTION_INPUTS = (
    *(("q_proj", "k_proj", "v_proj"), ("qkv_proj",), ("query_key_value",)),
    *(("query", "key", "value"), ("wq", "wk", "wv"), ("Wqkv",)),
)
_ATTENTION_OUTPUTS = ("o_proj", "dense", "out_proj", "wo", "Wo", "c_proj")
_FFNS = (
    FfnShape(("gate_proj", "up_proj"), "down_proj"),
    FfnShape(("fc1",), "fc2"),
    FfnShape(("gate_up_proj",), "down_proj"),
    FfnShape(("dense_h_to_4h",), "dense_4h_to_h"),
    FfnShape(("c_fc",), "c_proj"),
    FfnShape(("up_proj",), "down_proj"),
    FfnShape(("w1", "w3"), "w2"),
    FfnShape(("fc_in",), "fc_out"),
)
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")
# Fields of a configuration that usually say what becomes of the head's logits.
_LOGIT_FIELDS = {
    "logit_divisor": "logits_scaling",
    "logit_factor": "logit_scale",
    "logit_softcap": "final_logit_softcapping",
}
# What else they mean in some types; gemma3 ignores its own. What structure can't tell of others.
_EXCEPTIONS = {
    "hyperclovax": {"logit_divisor": "", "logit_factor": "logits_scaling"},
    "gemma3": {"logit_softcap": ""},
}
_ACTIVATION_FUNCTIONS = {"lfm2": "silu"}


def family_of(model: nn.Module) -> Family:
    """Tell a model's family by its structure."""
    is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
    if is_compiled or hasattr(model, "_orig_mod"):
        raise ModelError("model must not be compiled; attach the uncompiled model")
    find_head = getattr(model, "get_output_embeddings", None)
    if find_head is None or find_head() is None:  # a classifier has other heads
        raise unsupported(model, "it has no head with logits of tokens")
    config = text_config(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise unsupported(model, "it has an encoder")
    # The list of decoder layers, not of an encoder of images beside them.
    num_layers = getattr(config, "num_hidden_layers", None)
    inside = {id(module) for module in model.get_decoder().modules()}  # pyright: ignore
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and id(module) in inside and len(module) == num_layers
    ]
    if not lists:
        raise unsupported(model, f"no list of its modules has its {num_layers} decoder layers")
    path, layers = lists[0]
    described = [_blocks(layer) for layer in layers]
    attention = [
        (block, inputs, output)
        for blocks in described
        for block, linears in blocks.items()
        for inputs, output in product(_ATTENTION_INPUTS, _ATTENTION_OUTPUTS)
        if linears.issuperset((*inputs, output))
    ]
    if not attention:
        raise unsupported(model, "no layer has attention with projections of q, k, v and output")
    # Linear attention, which may have such projections too, comes last.
    block, inputs, output = min(attention, key=lambda one: "linear" in one[0])
    ffn, shape = _ffn(model, layers, described)
    fields = _LOGIT_FIELDS | _EXCEPTIONS.get(_model_type(model), {})
    return Family(
        attention_inputs=(inputs, (output,)),
        ffn_shape=shape,
        layers=path,
        attention=block,
        ffn=ffn,
        activation=_activation(model, layers[0].get_submodule(ffn), shape),
        **{name: getattr(config, field, None) or None for name, field in fields.items()},
    )


def unsupported(model: nn.Module, reason: str) -> ModelError:
    linears = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if is_linear(m)})
    return ModelError(
        f"model family must be one of {', '.join(FAMILIES)}, or one that is built and computes "
        f"like them (as a causal LM), got {shown(_model_type(model))} ({type(model).__name__}): "
        f"{reason}; its linear modules are {', '.join(linears) or 'none'}"
    )


def _model_type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", type(model).__name__)


def _ffn(
    model: nn.Module, layers: Iterable[nn.Module], described: Sequence[Mapping[str, set[str]]]
) -> tuple[str, FfnShape]:
    for block, shape in product(described[0], _FFNS):
        if all(blocks.get(block, set()).issuperset(shape.names) for blocks in described):
            return block, shape
    for block, child in (pair for layer in layers for pair in layer.named_children()):
        # Weights of several experts are one tensor.
        modules = [module for module in child.modules() if not isinstance(module, nn.Conv1d)]
        if any(w.dim() == 3 for module in modules for w in module.parameters(recurse=False)):
            return block, EXPERTS
    raise unsupported(
        model, "its layers have no module with the FFN block's projections, gate, up and down"
    )


def _activation(model: nn.Module, ffn: nn.Module, shape: FfnShape) -> str:
    if shape == EXPERTS or _model_type(model) in _ACTIVATION_FUNCTIONS:
        return _ACTIVATION_FUNCTIONS.get(_model_type(model), "")
    others = [name for name, _ in ffn.named_children() if name not in shape.names]
    named = [name for name in _ACTIVATIONS if callable(getattr(ffn, name, None))]
    if not named and len(others) != 1:
        raise unsupported(model, "its FFN block has no module that is its activation")
    return named[0] if named else others[0]


def _blocks(layer: nn.Module) -> dict[str, set[str]]:
    return {
        block: {name for name, module in child.named_children() if is_linear(module)}
        for block, child in layer.named_children()
    }


_ROWS, _LENGTH, _READ_FIRST = 2, 8, 5
# Most relative error of logits in float32.
_EXACT = 1e-5
# Most in 16 bits, or where weights have fewer; a wrong block is off by about 1.
_ROUNDED = 0.1
# Of B's numbers: with it an update is about as large as the projection's own output.
_STD = 0.3
_NAME = "trial"


def try_adapters(host: Any) -> None:
    """Try a host's base model with adapters; one without weights (on meta) is left alone."""
    if host.device.type == "meta":
        return
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(host.config.vocab_size, 1000), (_ROWS, _LENGTH), generator=generator)
    try:
        with torch.no_grad():
            _try_on(host, ids.to(host.device))
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
    for part, config in TRIALS.items():
        if part != "attention" and not host.base.ffn_projections:
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

    def add_update(key: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        num_calls[key] += 1
        A, B = (tensors[f"{key}.lora_{part}"] for part in "AB")
        update = adapter.config.scaling * (args[0].to(A.dtype) @ A.T @ B.T)
        return output + update.to(output.dtype)

    with ExitStack() as hooks:
        for projection in adapter.projections():
            hook = partial(add_update, projection.key)
            hooks.callback(projection.base.linear.register_forward_hook(hook).remove)
        expected = model(input_ids=ids).logits
    for key in (projection.key for projection in adapter.projections()):
        if num_calls[key] != 1:
            raise unsupported(model, f"{key} computes {num_calls[key]} times in a forward, not 1")
    return expected


@torch.inference_mode(False)
@torch.enable_grad()
def try_packing(host: Any, run_decoder: Callable[..., Any]) -> None:
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

    hook = host.model.get_input_embeddings().register_forward_hook(keep)
    try:
        output = run_decoder(
            input_ids=sample.repeat(1, 2).to(host.device),
            position_ids=positions.repeat(1, 2).to(host.device),
            use_cache=False,
        )
    finally:
        hook.remove()
    first, second = output.last_hidden_state.split(_LENGTH, dim=1)
    weights = torch.randn(second.shape, generator=generator)  # the sum after a norm may be constant
    (gradient,) = torch.autograd.grad((second * weights.to(second)).sum(), embeddings)
    is_apart = not gradient[:, :_LENGTH].any()
    if not (is_apart and _relative_error(second.detach(), first.detach()) <= _max_error(host)):
        raise ModelError(
            "packing requires a base model in which the samples of a row don't see each other, but "
            f"in {shown(_model_type(host.model))} (attn_implementation "
            f"{host.config._attn_implementation}) they do; set packing: false and "
            "group_by_length: true"
        )


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
