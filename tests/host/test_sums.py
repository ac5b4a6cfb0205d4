import gc
import weakref

import pytest
import torch

from loraloom import LoraConfig, PromptForm, TrainingClient
from loraloom.adapters.weighted_sum import parse_sum
from loraloom.errors import AdapterError
from loraloom.eval.cache import adapter_digest
from loraloom.eval.statistics import seed_groups
from tests.conftest import build_tokenizer
from tests.tiny import ALL_METHODS, changed, tiny_host, tiny_ids, tiny_model

MEMBERS = {
    "lora": LoraConfig(rank=3, alpha=6, dropout=0.5),
    "small": LoraConfig(rank=5, alpha=2, target_modules="attention"),
    "dora": LoraConfig(rank=2, alpha=6, weight_decomposition=True),
    "vera": ALL_METHODS["vera"],
    "moslora": ALL_METHODS["moslora"],
}
SUMS = ["lora:0.7+small:-0.3", "dora:0.5+lora+moslora:0.25", "vera+dora:-0.4", "lora:-0.2"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt_neox"])
def test_a_sum_adds_what_each_member_does_to_the_weights(family):
    host, ids = tiny_host(family, MEMBERS), tiny_ids(1)
    for text in SUMS:
        dense = tiny_model(family)
        for name, weight in parse_sum(text):
            for one in host.adapters[name].projections():
                target = next(
                    module for path, module in dense.named_modules() if path.endswith(one.key)
                )
                target.weight.data += weight * (one.merged(torch.float64) - one.base.weight)
        with torch.no_grad():
            torch.testing.assert_close(host(ids, adapters=[text]).logits, dense(ids).logits)


def test_sums_decode_side_by_side_and_scaled_as_alone():
    host, ids = tiny_host("llama", MEMBERS), tiny_ids(16)
    rows = [
        *(f"lora:{n / 8}+small:{1 - n / 8}" for n in range(1, 11)),
        SUMS[0],
        "lora:0.1+small:2",
        None,
        (SUMS[1], 0.5),
        "lora",
        [["vera", 1.0], ["dora", 0.5]],
    ]
    with torch.no_grad():
        session = host.prefill(ids[:, :4], None, rows)
        for column in ids[:, 4:].T:
            host.decode(session, column)
        alone = [host(ids[[n]], adapters=[row]).logits[0, -1] for n, row in enumerate(rows)]
        whole, half, base = (
            host(ids[:1], adapters=[(SUMS[0], one)]).logits for one in (1.0, 0.5, 0.0)
        )
    torch.testing.assert_close(session.logits, torch.stack(alone))
    torch.testing.assert_close(base, host(ids[:1]).logits)
    assert not torch.allclose(half, whole)


def test_sums_go_with_their_members():
    host, ids = tiny_host("llama", MEMBERS), tiny_ids(1)
    with torch.no_grad(), host.prepared():
        host(ids, adapters=[SUMS[0]])
    gone = weakref.ref(host.adapter(SUMS[0]))
    host.remove("small")
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("lora+mixlora", r"'mixlora' \(MixLoRA\) with experts"),
        ("lora+whole", r"'whole' \(LoRA\) with extra trainable modules"),
        ("lora+lora:2", "must be written as law:0.7.*, of 1 to 16 different ones"),
        ("lora:nan+dora", "finite weights"),
        ("lora+law", "got 'law'"),
        ("mixlora:0.5", r"scale it alone: \(name, scale\)"),
        ([("lora", 1.0), "dora"], "a row's adapter must be a name"),
        (["lora"], "a row's adapter must be a name"),
    ],
)
def test_what_is_no_sum_says_why(row, message):
    whole = changed(MEMBERS["lora"], modules_to_save=["lm_head"])
    more = {"mixlora": ALL_METHODS["mixlora"], "whole": whole}
    with pytest.raises(AdapterError, match=message):
        tiny_host("llama", MEMBERS | more)(tiny_ids(1), adapters=[row])


def test_a_sum_has_no_files_and_is_not_trained(tmp_path):
    host = tiny_host("llama", MEMBERS)
    with pytest.raises(AdapterError, match=r"one of those on this host .*, got 'lora:0.7\+sm"):
        host.save(SUMS[0], tmp_path)
    with pytest.raises(AdapterError, match="is not trained"):
        host(tiny_ids(1), adapters=["lora+dora"], training=True)
    with pytest.raises(AdapterError, match="is not trained"):
        TrainingClient(host, build_tokenizer(), "lora+dora")


def test_scores_of_a_sum_depend_on_all_settings_and_are_no_seeds():
    digests = set()
    for alpha in (2.0, 3.0):
        host = tiny_host("llama", MEMBERS | {"small": changed(MEMBERS["small"], alpha=alpha)})
        digests |= {adapter_digest(host.adapter(text)) for text in ("lora+small", "lora+small:2")}
    assert len(digests) == 4
    assert seed_groups(["a@0", "a@1", "a@0:0.5"]) == {"a": ["a@0", "a@1"]}


def test_a_sum_reads_its_members_forms_of_prompts():
    host, form = tiny_host("llama", MEMBERS), PromptForm(format="text")
    total, host.adapters["lora"].prompt = host.adapter("lora+dora"), form
    assert total.prompt is None
    host.adapters["dora"].prompt = form
    assert host.adapter("lora+dora").prompt == form


@torch.no_grad()
@pytest.mark.parametrize("name", [SUMS[1], "dora:0.50+lora:1.0+moslora:0.25"])
def test_a_sum_is_merged_and_unmerged_however_its_name_is_written(name):
    host, ids = tiny_host("llama", MEMBERS), tiny_ids(1)
    expected = [host(ids, adapters=[row]).logits for row in (SUMS[1], None)]
    host.merge(SUMS[1])
    torch.testing.assert_close(host(ids).logits, expected[0])
    host.unmerge(name)
    assert torch.equal(host(ids).logits, expected[1])
