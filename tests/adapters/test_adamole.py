"""AdaMoLE, the example of docs/add_a_method.md: a package's method that needs x and records.

docs/add_a_method.md itself holds it against its formula.
"""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from loraloom.adapters.mixlora import MixLoraAdapter
from loraloom.errors import AdapterError
from tests.tiny import ALL_METHODS, padded_mask, randomise, tiny_host, tiny_ids
from tests.training.step.test_fused import assert_same, run_window
from tests.training.toy import PAD_ID, add_job, forward_backward, gradients_of, toy_config, toy_host

DOCUMENT = Path(__file__).parents[2] / "docs/add_a_method.md"
LENGTHS = [7, 3, 5]


@pytest.fixture
def config(methods_as_before, tmp_path):
    """A configuration of the example's class, which is registered."""
    block = re.search(r"```python\n(# adamole\.py\n.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert block is not None
    path = tmp_path / "adamole.py"
    path.write_text(block[1])
    spec = importlib.util.spec_from_file_location("adamole", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = {"rank": 2, "num_experts": 4, "router_aux_loss_coef": 0.5}
    return module.AdaMoleConfig(**settings, target_modules=("q_proj", "down_proj"))


def test_the_record_has_real_tokens_thresholds_too(config):
    host, ids, mask = tiny_host(configs={"a": config}), tiny_ids(3), padded_mask(LENGTHS)
    together = host.hidden(ids, mask, ["a"] * 3).routing["a"]
    alone = [
        host.hidden(ids[row : row + 1, :length], None, ["a"]).routing["a"]
        for row, length in enumerate(LENGTHS)
    ]
    for place, record in enumerate(together):
        expected = torch.cat([one[place].extra["threshold"] for one in alone])
        torch.testing.assert_close(record.extra["threshold"], expected, rtol=0, atol=1e-10)
        assert record.emptied().extra["threshold"].shape == (0, 1)


def test_a_recorded_value_is_a_metric_however_a_step_is_cut(config):
    results = []
    for settings in (
        {"micro_batch_size": 8},
        {"micro_batch_size": 1},
        {"micro_batch_size": 8, "packing": True, "max_length": 30},
        {"gradient_checkpointing": True},
    ):
        host = toy_host()
        host.enable_gradient_checkpointing(settings.get("gradient_checkpointing", False))
        job = add_job(host, toy_config("a", config, batch_size=8, **settings), random=True)
        results.append((run_window(host, [job])["a"], gradients_of(job)))
    (whole, gradients), *others = results
    assert 0 < whole.metrics["router/threshold"] < 1 / 4
    assert any("threshold" in name and grad.any() for name, grad in gradients.items())
    for loss, _ in others:
        assert loss.metrics == pytest.approx(whole.metrics, rel=1e-6)
    for loss, its_gradients in others[1:]:  # the balance of one row is another one
        assert loss.aux_loss == pytest.approx(whole.aux_loss, rel=1e-6)
        assert_same(its_gradients, gradients, 1e-6)


def test_ranks_add_up_to_the_metric_of_all(config):
    host = toy_host()
    job = add_job(host, toy_config("a", config, batch_size=3), random=True)
    batch = job.micro_batch()
    whole, *parts = (
        forward_backward(host, [batch], PAD_ID),
        *(forward_backward(host, [batch.share(rank, 4)], PAD_ID) for rank in range(4)),
    )
    metrics = [part.metrics["router/threshold"] for (part,) in parts]
    assert metrics[3] == 0  # no row is left for it
    assert sum(metrics) == pytest.approx(whole[0].metrics["router/threshold"], rel=1e-9)


def test_it_is_saved_and_decodes_as_it_was_trained(config, tmp_path):
    host = tiny_host(configs={"a": config})
    host.save("a", tmp_path)
    host.load("b", tmp_path)
    ids = tiny_ids(2)
    with torch.no_grad(), host.prepared():
        full = host(ids, adapters=["a", "b"]).logits
        torch.testing.assert_close(host(ids[:, :1], adapters=["b", "a"]).logits, full[:, :1])
        torch.testing.assert_close(host(ids, adapters=["b", "b"]).logits[:1], full[:1])


class ChoosingAdapter(MixLoraAdapter):
    """Chooses as MixLoRA does, weighs by a share, and records how sure it is."""

    share = 1.0

    def choose(self, block, logits, hidden_states, tokens):
        selected, weights, _ = super().choose(block, logits, hidden_states, tokens)
        return selected, self.share * weights, {"first": weights[:, 0]}


def test_a_mixture_of_whole_blocks_may_choose_in_its_own_way():
    class ChoosingConfig(type(ALL_METHODS["mixlora"])):
        """A MixLoRA."""

        def build(self, name, base_layers, dtype, seed):
            return ChoosingAdapter(name, self, base_layers, dtype, seed)

    host, ids = tiny_host(configs={"a": ALL_METHODS["mixlora"]}), tiny_ids(2)
    randomise(host.add("b", ChoosingConfig(**ALL_METHODS["mixlora"].model_dump())))
    host.adapters["b"].load_tensors(host.adapters["a"].tensors())
    with torch.no_grad():
        out = host(ids, adapters=["a", "b"])
        alike = host(ids[1:], adapters=["a"]).logits
        with host.prepared():
            decoded = host(ids[1:, :1], adapters=["b"]).logits
    torch.testing.assert_close(out.logits[1:], alike)
    torch.testing.assert_close(decoded, alike[:, :1])
    for record in out.routing["b"]:
        assert torch.equal(record.extra["first"], record.routing_weights[:, 0])
    with pytest.raises(AdapterError, match=r"whole FFN experts for each token .*, got MixLoRA"):
        host.adapters["b"].as_moe(host.adapters["b"].base_layers[0].blocks[1])
    host.adapters["b"].share = 0.0  # no token uses an expert
    with torch.no_grad():
        assert host(ids, padded_mask([3, 7]), ["b", "b"]).logits.isfinite().all()


@pytest.mark.parametrize("method", ["lora", "mixlora"])
def test_an_ffn_block_of_its_own_decodes_as_in_full_forwards(method):
    host, ids = tiny_host(configs={"a": ALL_METHODS[method]}), tiny_ids(1)

    class OwnAdapter(type(host.adapters["a"])):
        def ffn(self, block, weights, hidden_states, *others):
            return super().ffn(block, weights, 2 * hidden_states, *others)

    host.adapters["a"].__class__ = OwnAdapter
    with torch.no_grad(), host.prepared():
        decoded = host(ids, adapters=["a"]).logits
    torch.testing.assert_close(decoded, host(ids, adapters=["a"]).logits)
