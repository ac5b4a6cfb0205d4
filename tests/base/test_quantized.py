"""Adapters on quantized bases, as the libraries themselves have them."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn

import loraloom
from loraloom.base.blocks import BaseProjection
from loraloom.base.quantization import quantized_weights
from loraloom.errors import AdapterError, ConfigError, ModelError
from loraloom.host.host import Host
from loraloom.host.wiring import QuantizedLinear
from tests.generation.saved import save_tiny
from tests.tiny import (
    METHODS,
    gradients,
    randomise,
    relative_error,
    stored_weights,
    tiny_ids,
    tiny_model,
)

with warnings.catch_warnings():  # of what torch and triton call deprecated
    warnings.simplefilter("ignore")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    pytest.importorskip("torchao")
    peft = pytest.importorskip("peft")
    from peft.utils.integrations import dequantize_module_weight

    from tests.parity.peft_models import their_parameter

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*was instantiated without `get_apply_tensor_subclass`"
)

KINDS = {
    "nf4": "bitsandbytes nf4",
    "int8": "bitsandbytes int8",
    "torchao-int8": "torchao Int8Tensor",
}
IDS = tiny_ids(4, 9)
ROWS = [*METHODS]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base model with biases, saved in float32."""
    sizes = {"hidden_size": 64, "intermediate_size": 192}
    biases = {"attention_bias": True, "mlp_bias": True}
    return save_tiny(tmp_path_factory.mktemp("saved"), **sizes, **biases)


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


def load(saved, kind=None) -> nn.Module:
    return loraloom.load_base_model(str(saved / "base"), quantization=kind)[0]


@pytest.fixture(scope="module")
def host(saved, kind) -> Host:
    """A host with an adapter of each method."""
    host = loraloom.attach(load(saved, kind))
    for seed, (name, config) in enumerate(METHODS.items()):
        randomise(host.add(name, config, seed=seed), seed)
    return host


def projections(host: Host) -> list[BaseProjection]:
    return [base for layer in host.adapters["lora"].base_layers for base in layer.projections]


def loss_of(logits: Tensor) -> Tensor:
    return (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).tanh().sum()


def test_weights_are_those_that_peft_dequantises(host):
    for projection in projections(host):
        assert projection.weight.equal(dequantize_module_weight(projection.linear))


@contextmanager
def same_rounding() -> Iterator[list[Tensor]]:
    """Let LLM.int8 round a layer's input as it rounded the same input before.

    What differs in the last bit, as from CPU to CPU, may be rounded to the next of 127 steps.
    """
    functional = bitsandbytes.functional
    rounded: list[tuple[Tensor, tuple]] = []
    inputs = []

    def quantise(rows: Tensor, *args, quantise=functional.int8_vectorwise_quant, **kwargs):
        inputs.append(rows.clone())
        for known, result in rounded:
            if known.shape == rows.shape and relative_error(rows, known) < 1e-3:
                return result
        rounded.append((inputs[-1], quantise(rows, *args, **kwargs)))
        return rounded[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "int8_vectorwise_quant", quantise)
        yield inputs


@pytest.mark.parametrize("noise", [0.0, 1e-6])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_logits_and_gradients_are_those_of_peft(saved, kind, host, method, noise, tmp_path):
    host.save(method, tmp_path)
    theirs = peft.PeftModel.from_pretrained(load(saved, kind), tmp_path, is_trainable=True)
    for linear in theirs.modules():  # or it packs first layers anew on some CPUs
        if isinstance(linear, bitsandbytes.nn.Linear4bit):
            linear.support_avx512bf16_for_cpu = False
    theirs.eval()  # on a CPU, LLM.int8 multiplies floating-point numbers in training
    embedding = theirs.get_input_embeddings().weight  # as another CPU might compute its rows
    embedding.data *= 1 + noise * torch.randn(
        embedding.shape, generator=torch.Generator().manual_seed(0)
    )
    adapter = host.adapter(method)
    weights = {name: tensor.clone() for name, tensor in adapter.named_parameters()}
    with same_rounding() as inputs:
        expected = theirs(input_ids=IDS).logits
        num_theirs = len(inputs)
        actual = host(IDS, adapters=[method] * 4).logits
        assert len(inputs) == 2 * num_theirs
    loss_of(expected).backward()
    adapter.zero_grad()
    loss_of(actual).backward()
    assert relative_error(actual.detach(), expected.detach()) < 1e-5
    for name, grad in gradients(adapter).items():
        assert relative_error(grad, their_parameter(theirs, host.base, name).grad) < 1e-4, name
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter.copy_(weights[name])


def test_decoding_step_by_step_gives_the_logits_of_whole_rows(host, kind):
    with torch.no_grad():
        session = host.prefill(IDS[:, :6], adapters=ROWS)
        for column in range(6, 9):
            host.decode(session, IDS[:, column])
        whole = host(IDS, adapters=ROWS).logits[:, -1]
    assert relative_error(session.logits, whole) < (0.05 if kind == "int8" else 1e-5)


def test_gradients_are_the_same_after_decoding(host):
    """bitsandbytes packs layers for decoding on some CPUs, in a form without a backward pass."""
    adapter = host.adapter("mixlora")

    def grads() -> list[Tensor]:
        adapter.zero_grad()
        loss_of(host(IDS, adapters=["mixlora"] * 4).logits).backward()
        return [parameter.grad.clone() for parameter in adapter.parameters()]

    before = grads()
    with torch.no_grad():
        host(IDS, adapters=["mixlora"] * 4)
        host.prefill(IDS[:1], adapters=["mixlora"])
    assert all(one.equal(other) for one, other in zip(before, grads(), strict=True))
    assert all(bool(grad.any()) for grad in before)


def test_outliers_in_float16_leave_what_others_keep_of_an_input_alone(saved):
    """LLM.int8 takes them out of its input and puts them back, which counts as a change."""
    model = loraloom.load_base_model(str(saved / "base"), "float16", quantization="int8")[0]
    weight = next(iter(quantized_weights(model).values()))
    hidden_states = torch.linspace(-1, 1, 3 * 64).reshape(3, 64).half()
    hidden_states[1, 5] = 50.0
    hidden_states.requires_grad_()
    squares = (hidden_states * hidden_states).sum()
    (squares + QuantizedLinear(weight)(hidden_states).sum()).backward()
    expected = 2 * hidden_states.detach() + weight.dequantized().half().sum(0)
    assert hidden_states.grad is not None
    assert relative_error(hidden_states.grad, expected) < 1e-3


def kept_bytes(host: Host, name: str = "lora") -> int:
    """What a forward with an adapter keeps for its backward pass, but for the base's weights."""
    known = {tensor.untyped_storage().data_ptr() for _, tensor in stored_weights(host.model)}
    kept: dict[int, int] = {}

    def look(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        host(IDS, adapters=[name] * 4)
    return sum(kept.values())


def test_a_forward_keeps_no_more_than_on_an_unquantized_base(host, saved):
    plain = loraloom.attach(load(saved))
    plain.add("lora", METHODS["lora"])
    assert kept_bytes(host) <= 1.01 * kept_bytes(plain)


def test_a_quantized_checkpoint_is_loaded_as_it_is(saved, kind, tmp_path):
    model, tokenizer = loraloom.load_base_model(str(saved / "base"), quantization=kind)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = loraloom.load_base_model(str(tmp_path))
    hosts = [loraloom.attach(one) for one in (model, again)]
    assert hosts[0].base.fingerprint == hosts[1].base.fingerprint
    with torch.no_grad():
        logits = [host(IDS).logits for host in hosts]
    assert logits[0].equal(logits[1])
    with pytest.raises(ConfigError, match=r"is already quantized by .*remove quantization"):
        loraloom.load_base_model(str(tmp_path), quantization="nf4")


def test_a_base_that_is_quantized_again_is_the_one_of_the_adapter(saved, kind, host, tmp_path):
    host.save("lora", tmp_path)
    loraloom.attach(load(saved, kind)).load("again", tmp_path)  # without a warning


def test_detaching_leaves_the_model_as_it_was(saved, kind):
    model = load(saved, kind)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    host = loraloom.attach(model)
    host.add("lora", METHODS["lora"])
    host.detach()
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        flag = "support_avx512bf16_for_cpu"
        assert vars(module).get(flag) == before[name].get(flag)


@pytest.mark.parametrize("method", ["dora", "mixdora"])
def test_an_export_computes_what_the_adapter_does(saved, host, method, kind, tmp_path):
    tokenizer = loraloom.load_base_model(str(saved / "base"))[1]
    if method == "mixdora":  # no class of mixtures has biases
        with pytest.raises(AdapterError, match="bias"):
            loraloom.export(host, tokenizer, method, tmp_path / "out")
        return
    full = torch.full((32, 32), 127, dtype=torch.int8)
    sums = torch.ops.bitsandbytes.int8_linear_matmul(full, full)
    if kind == "int8" and sums[0, 0] != 32 * 127**2:  # torch asks the CPU alone, and not oneDNN
        pytest.skip("ONEDNN_MAX_CPU_ISA leaves out VNNI: oneDNN's sums of products saturate")
    done = loraloom.export(host, tokenizer, method, tmp_path / "out")
    assert done.logit_error is not None
    assert done.logit_error < (0.1 if kind == "int8" else 1e-5)


def test_merging_is_refused_before_anything_is_changed(host, kind):
    message = f"merging changes the base's weights.*{KINDS[kind]}.*export"
    with pytest.raises(AdapterError, match=message):
        host.merge("lora")
    assert host.merged is None


class Coded(nn.Module):
    """A linear layer of a library that nobody knows: whole numbers and a scale."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.codes.to(hidden_states.dtype) * self.scale
        return nn.functional.linear(hidden_states, weight, self.bias)


def test_a_format_that_nobody_knows_is_read_by_what_the_layer_computes():
    model, dense = (tiny_model(dtype=torch.float32, mlp_bias=True) for _ in range(2))
    for name, linear in [*model.named_modules()]:
        if isinstance(linear, nn.Linear) and "layers" in name:
            coded = Coded(linear)
            model.set_submodule(name, coded)
            dense.get_submodule(name).weight.data.copy_(coded.codes.float() * coded.scale)
    hosts = [loraloom.attach(one) for one in (model, dense)]
    results = []
    for host in hosts:
        adapter = randomise(host.add("a", METHODS["mixdora"]))
        logits = host(IDS, adapters=["a"] * 4).logits
        loss_of(logits).backward()
        results.append([logits.detach(), *(p.grad for p in adapter.parameters())])
    assert hosts[0].base.quantization == "Coded"
    assert hosts[0].base.num_parameters == hosts[1].base.num_parameters
    for one, other in zip(*results, strict=True):
        assert relative_error(one, other) < 1e-5


def test_what_cant_be_had_is_an_error_before_anything_is_loaded(saved, monkeypatch):
    monkeypatch.setattr("loraloom.base.loading._read_model", lambda *_: pytest.fail("loaded"))
    for one in ("nf4", "torchao-int8"):
        with pytest.raises(ModelError, match=f"{one} does not support dtype: float64"):
            loraloom.load_base_model(str(saved / "base"), quantization=one, dtype="float64")
    with pytest.raises(ConfigError, match="got 'nf5'; did you mean 'nf4'"):
        loraloom.load_base_model(str(saved / "base"), quantization="nf5")


@pytest.mark.parametrize("library", ["bitsandbytes", "torchao"])
def test_a_library_that_is_missing_is_named_with_its_extra(saved, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    kind = {"bitsandbytes": "nf4", "torchao": "torchao-int8"}[library]
    with pytest.raises(ConfigError, match=rf"needs {library}.*pip install 'loraloom\[quantization"):
        loraloom.load_base_model(str(saved / "base"), quantization=kind)


def test_rows_that_bitsandbytes_computes_wrongly_on_a_cpu_are_refused(tmp_path):
    model = load(save_tiny(tmp_path), "nf4")
    with pytest.raises(ModelError, match=r"multiple of 64 on a CPU.*got 32 in model.layers.0"):
        loraloom.attach(model)


def test_a_model_on_several_devices_is_refused():
    model = tiny_model(dtype=torch.float32)
    model.model.layers[1].to("meta")
    with pytest.raises(ModelError, match="must be on one device, got parts on cpu, meta"):
        loraloom.attach(model)


@torch.no_grad()
def test_autocast_changes_rounding_alone(host):
    """It comes last, as bitsandbytes rounds biases for good."""
    exact = host(IDS, adapters=ROWS).logits
    for context in (host.prepared(), nullcontext()):
        with torch.autocast("cpu", torch.bfloat16), context:
            assert relative_error(host(IDS, adapters=ROWS).logits.float(), exact) < 0.1
