"""Adapters as LoRAs for vLLM, and FFN blocks that compute them, against our own layers."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu

from loraloom.adapters import LoraConfig, MixLoraConfig, MolaConfig, MosLoraConfig
from loraloom.errors import AdapterError
from loraloom.serve.vllm.folding import Folder, needs_folding, split_in_pieces
from loraloom.serve.vllm.layers import MixtureFfn, define_operations
from tests.tiny import METHODS, changed, tiny_host

SERVED = {
    "small": MixLoraConfig(rank=2, alpha=4, num_experts=4, top_k=2),
    "large": MixLoraConfig(
        rank=2, alpha=3, num_experts=3, top_k=3, experts={"rank": 4, "alpha": 2.0}
    ),
    "one": MixLoraConfig(rank=3, alpha=4, num_experts=5, top_k=1, target_modules="ffn"),
    "lora": LoraConfig(rank=5, alpha=6),
    "mixed": MosLoraConfig(rank=4, alpha=6),
}
REFUSED = {
    "dora": METHODS["dora"],
    "mixdora": METHODS["mixdora"],
    "mola": MolaConfig(rank=2, num_experts=(3, 4), router_loss_scope="per_layer"),
}
ROOM = 16
LAYER = 1


@pytest.fixture(scope="module", params=["llama", "phi3"])
def served(request, tmp_path_factory):
    """A host, and its adapters folded from their files."""
    host = tiny_host(request.param, SERVED | REFUSED, torch.float32)
    directory = tmp_path_factory.mktemp("served")
    for name in host.adapters:
        host.save(name, directory / name)
    folder = Folder(host.config)
    folded = {name: folder.fold(directory / name) for name in SERVED}
    return SimpleNamespace(host=host, folder=folder, folded=folded, directory=directory)


def test_each_adapter_keeps_its_own_rank_and_top_k(served):
    ranks = {name: one.rank for name, one in served.folded.items()}
    assert ranks == {"small": 12, "large": 12, "one": 15, "lora": 5, "mixed": 4}
    assert [one.top_k for one in served.folded.values()] == [2, 3, 1, None, None]


def test_attention_is_a_lora_with_the_scaling_in_its_B(served):
    adapter, folded = served.host.adapters["large"], served.folded["large"]
    attention = adapter.base_layers[1].blocks[0]
    for name, projection in adapter.weights_on(attention).items():
        place = f"base_model.model.model.layers.1.self_attn.{name}"
        update = folded.tensors[f"{place}.lora_B.weight"] @ folded.tensors[f"{place}.lora_A.weight"]
        weight = projection.base.weight
        torch.testing.assert_close(weight + update, projection.merged(torch.float32))


def kept_block(served):
    """An FFN block of the base, its input projections' names, and A and B of all slots, padded."""
    block = served.host.model.model.layers[LAYER].mlp
    inputs = ["gate_up_proj"] if hasattr(block, "gate_up_proj") else ["gate_proj", "up_proj"]
    sizes = {name: (32, 96 // len(inputs)) for name in inputs}
    kept = {}
    for name, (size, outputs) in (sizes | {"down_proj": (48, 32), "router": (32, 2)}).items():
        A, B = torch.zeros(len(SERVED), ROOM, size), torch.zeros(len(SERVED), outputs, ROOM)
        place = f"base_model.model.model.layers.{LAYER}.mlp.{name}"
        for slot, one in enumerate(served.folded.values()):
            own = [one.tensors.get(f"{place}.lora_{side}.weight") for side in "AB"]
            if own[0] is not None:
                A[slot, : len(own[0])] = own[0]
                B[slot, :, : own[1].shape[1]] = own[1]
        kept[name] = A, B
    return block, inputs, kept


def tokens_of_all():
    """Tokens that are the base's, the first adapter's and so on by turns."""
    x = torch.randn(24, 32, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(24) % (len(SERVED) + 1) - 1


@torch.no_grad()
def alone(served, x, adapters):
    """Each token's FFN output by our own layers, of one at a time."""
    from loraloom.host.forward import running
    from loraloom.host.forwards import ForwardRequest

    host, names, outputs = served.host, [*SERVED, None], []
    for row, at in zip(x, adapters.tolist(), strict=True):
        input_ids = torch.zeros(1, 1, dtype=torch.long)
        request = ForwardRequest(input_ids=input_ids, adapters=[names[at]])
        with running(host.forwards.open(request)):
            outputs.append(host.model.model.layers[LAYER].mlp(row.view(1, 1, -1)).view(-1))
    return torch.stack(outputs)


class StackedLinear(torch.nn.Module):
    """What vLLM puts around a linear layer: its LoRAs of all slots, and who has which tokens."""

    def __init__(self, weight, loras, adapters, outputs):
        super().__init__()
        self.base_layer = lambda x: (x @ weight.T, None)
        self.input_size, self.tp_size = weight.shape[1], 1
        self.lora_a_stacked = tuple(A.unsqueeze(1) for A, _ in loras)
        self.lora_b_stacked = tuple(B.unsqueeze(1) for _, B in loras)
        self.n_slices, self.output_slices = len(loras), outputs
        self.punica_wrapper = SimpleNamespace(
            no_lora=False,
            _token_lora_indices=adapters,
            add_shrink=self._add_shrink,
            add_expand=self._add_expand,
        )

    def _add_shrink(self, buffer, x, stacked, scale):
        adapters = self.punica_wrapper._token_lora_indices.clamp_min(0)
        buffer += scale * torch.einsum("ti,tpsi->pts", x, torch.cat(stacked, 1)[adapters])

    def _add_expand(self, output, low_rank, stacked, sizes, *, add_inputs):
        assert add_inputs
        adapters = self.punica_wrapper._token_lora_indices.clamp_min(0)
        updates = [
            torch.einsum("ts,tos->to", values, lora_B[:, 0][adapters])
            for values, lora_B in zip(low_rank, stacked, strict=True)
        ]
        assert [update.shape[1] for update in updates] == sizes
        output += torch.cat(updates, -1)


BLOCKS: dict[str, MixtureFfn] = {}


@pytest.fixture(scope="module")
def operations():
    define_operations(BLOCKS.__getitem__)
    return torch.ops.loraloom


def make_ffn(served, slots=3, own=slice(None)):
    """vLLM's block with the plug-in's forward, on a device that has a part of the features."""
    block, inputs, kept = kept_block(served)
    _, adapters = tokens_of_all()
    both = torch.cat([torch.arange(48)[own], 48 + torch.arange(48)[own]])  # of gate and up
    parts = [both] if len(inputs) == 1 else [own, own]
    loras = [
        (kept[name][0], kept[name][1][:, part]) for name, part in zip(inputs, parts, strict=True)
    ]
    weight = torch.cat([getattr(block, name).weight.detach() for name in inputs])[both]
    ffn = MixtureFfn()
    ffn.gate_up_proj = StackedLinear(weight, loras, adapters, [B.shape[1] for _, B in loras])
    down_A, down_B = kept["down_proj"]
    down = block.down_proj.weight.detach()[:, own]
    ffn.down_proj = StackedLinear(down, [(down_A[..., own], down_B)], adapters, [32])
    ffn.router = StackedLinear(torch.zeros(2, 32), [kept["router"]], adapters, [2])
    ffn.act_fn = lambda both: silu(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1]
    ffn.place, ffn.slots = "layers.1.mlp", slots
    BLOCKS[ffn.place] = ffn
    return ffn


@pytest.fixture
def mixture_ffn(served):
    return make_ffn(served)


@torch.no_grad()
@pytest.mark.parametrize(("slots", "num_devices"), [(4, 1), (3, 2)])
def test_tokens_of_all_adapters_meet_their_own_experts_in_one_pass(served, slots, num_devices):
    """Devices may share a block's features: what they add up are outputs and rank spaces."""
    x, adapters = tokens_of_all()
    output = rank_space = 0
    for own in torch.arange(48).chunk(num_devices):
        ffn = make_ffn(served, slots, own)
        hidden, part = ffn.mix_experts(x, ffn.gate_up_proj.base_layer(x)[0])
        output, rank_space = output + ffn.down_proj.base_layer(hidden)[0], rank_space + part
    output = ffn.add_update(output, rank_space)
    torch.testing.assert_close(output, alone(served, x, adapters), rtol=1e-4, atol=1e-5)


def test_operations_are_what_torch_expects_of_them(operations, mixture_ffn):
    x, _ = tokens_of_all()
    gate_up, output = torch.randn(24, 96), torch.randn(24, 32)
    opcheck = torch.library.opcheck
    for no_lora in (False, True):
        mixture_ffn.gate_up_proj.punica_wrapper.no_lora = no_lora
        mixture_ffn.down_proj.punica_wrapper.no_lora = no_lora
        opcheck(operations.mix_experts, (x, gate_up, 48, ROOM, mixture_ffn.place))
        opcheck(operations.add_update, (output, torch.randn(24, ROOM), mixture_ffn.place))


def test_a_compiled_block_has_one_graph_and_our_own_layers_outputs(operations, served, mixture_ffn):
    x, adapters = tokens_of_all()
    compiled = torch.compile(mixture_ffn, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        output = compiled(x)
    torch.testing.assert_close(output, alone(served, x, adapters), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_diverged_adapters_spoil_no_others_tokens(operations, served, mixture_ffn):
    x, adapters = tokens_of_all()
    before = mixture_ffn(x)
    for layer in (mixture_ffn.gate_up_proj, mixture_ffn.down_proj, mixture_ffn.router):
        for stacked in (*layer.lora_a_stacked, *layer.lora_b_stacked):
            stacked[0] = torch.nan
    others = adapters != 0
    torch.testing.assert_close(mixture_ffn(x)[others], before[others])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dora", "weight decomposition scales rows of the base model's own weights"),
        ("mixdora", "weight decomposition scales rows of the base model's own weights"),
        ("mola", r"only routers of whole FFN blocks, got one on self_attn"),
    ],
)
@pytest.mark.filterwarnings("ignore:.* is a DoRA without magnitudes")
def test_what_no_lora_can_do_is_refused(served, tmp_path, name, message):
    with pytest.raises(AdapterError, match=message):
        served.folder.fold(served.directory / name)
    file = shutil.copytree(served.directory / name, tmp_path / name) / "adapter_model.safetensors"
    save_file({k: one for k, one in load_file(file).items() if "magnitude" not in k}, file)
    with pytest.raises(AdapterError, match=message):
        served.folder.fold(file.parent)


@torch.no_grad()
def test_other_scalings_of_some_modules_are_folded_as_vllm_knows_one(tmp_path):
    lora = LoraConfig(rank=2, target_modules=["q_proj"])
    config = changed(
        lora, rank_pattern={"layers.1.self_attn.q_proj": 4}, alpha_pattern={"q_proj": 3}
    )
    host = tiny_host(configs={"a": config}, dtype=torch.float32)
    host.save("a", tmp_path)
    folded = Folder(host.config).fold(tmp_path).tensors
    for layer, scaling in enumerate((3 / 2, 3 / 4)):
        place = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        lora_B = host.adapters["a"].tensors()[f"layers.{layer}.self_attn.q_proj.lora_B"]
        torch.testing.assert_close(folded[f"{place}.lora_B.weight"], scaling * lora_B)
    assert [*map(needs_folding, (config, SERVED["small"], lora))] == [True, True, False]


def test_float32_is_three_bfloat16():
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    pieces = split_in_pieces(values)
    assert torch.equal(pieces, pieces.bfloat16().float())
    torch.testing.assert_close(pieces.sum(1), values, rtol=1e-7, atol=0)
