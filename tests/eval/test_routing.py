import json

import pytest
import torch

from loraloom import RoutedConfig
from loraloom.eval.cache import ScoreCache
from loraloom.eval.results import Evaluation
from loraloom.eval.routing import RoutingTally
from loraloom.eval.score import Scorer, score_questions
from tests.eval.scoring import limit_rows, scoring_host, some_questions
from tests.tiny import ALL_METHODS, METHODS, randomise

NAMES = [None, "lora", "mixlora", "mixdora"]


def tallied(
    host, tokenizer, adapters=NAMES, tasks=("toy",), max_tokens=None, cache=None, groups=()
):
    """Score the toy questions as each task; give the tally's summary."""
    tally = RoutingTally(host, adapters, tokenizer)
    for task in tasks:
        scorer = Scorer(host, tokenizer, adapters, max_tokens, cache)
        observe = tally.observe(task, len(some_questions()), groups)
        score_questions(scorer, some_questions(), on_routing=observe)
    return tally.summarise()


@pytest.fixture
def summary(tiny_tokenizer):
    return tallied(scoring_host(), tiny_tokenizer)


def test_every_mixture_is_there_and_all_questions_are_covered(summary):
    assert list(summary) == ["mixlora", "mixdora"]
    assert summary["mixlora"]["num_experts"] == METHODS["mixlora"].num_experts
    assert summary["mixlora"]["layers"] == [0, 1]
    task = summary["mixlora"]["tasks"]["toy"]
    assert task["num_questions"] == task["num_questions_covered"] == len(some_questions())
    assert [sum(row) for row in task["load"]] == pytest.approx([1, 1], abs=1e-5)
    assert all(1 <= number <= 4 for number in task["effective_experts"])
    json.dumps(summary, allow_nan=False)


def test_routers_may_sit_on_projections_and_may_mix_all_experts(tiny_tokenizer):
    """MoLA and HydraLoRA have routers of their own everywhere; HydraLoRA's choose nothing."""
    host = scoring_host()
    for name in ("mola", "hydralora"):
        randomise(host.add(name, ALL_METHODS[name]))
    summary = tallied(host, tiny_tokenizer, [*NAMES, "mola", "hydralora"])
    assert list(summary) == ["mixlora", "mixdora", "mola", "hydralora"]
    for name, num_experts in (("mola", 4), ("hydralora", 3)):
        routing, task = summary[name], summary[name]["tasks"]["toy"]
        assert routing["num_experts"] == num_experts
        assert routing["layers"][:2] == ["0.self_attn.q_proj", "0.self_attn.k_proj"]
        assert len(routing["layers"]) == 2 * 7
        for row in task["load"]:
            assert len(row) == num_experts
            assert sum(row) == pytest.approx(1, abs=1e-5)
        assert [*task["example"]["experts"]] == [routing["layers"][n] for n in (0, 7, 13)]
    assert summary["mola"]["experts_by_layer"] == [3] * 7 + [4] * 7
    hydra = summary["hydralora"]
    assert (hydra["top_k"], hydra["warnings"]) == (3, [])
    assert len({round(share, 3) for share in hydra["tasks"]["toy"]["load"][0]}) == 3
    written = Evaluation(schema_version=1, results={}, routing=summary).to_json()
    assert json.loads(json.dumps(written, allow_nan=False))["routing"] == summary


def test_an_expert_beside_its_router_counts_its_own_questions_once(tiny_tokenizer):
    host = scoring_host()
    host.add("auto", RoutedConfig(experts={"mix": "mixlora"}))
    alone, beside = (
        tallied(host, tiny_tokenizer, names)["auto/mix"]["tasks"]["toy"]
        for names in (["auto/mix"], ["auto", "auto/mix"])
    )
    assert alone["num_tokens"] == beside["num_tokens"]


def test_layers_with_fewer_experts_have_not_collapsed(tiny_tokenizer):
    host = scoring_host()
    config = ALL_METHODS["mola"].model_copy(update={"num_experts": (2, 40), "top_k": 2})
    randomise(host.add("mola", config))
    routing = tallied(host, tiny_tokenizer, ["mola"])["mola"]
    assert routing["experts_by_layer"] == [2] * 7 + [40] * 7
    assert not any("layer 0" in warning for warning in routing["warnings"]), routing["warnings"]


def test_batches_padding_neighbours_and_lost_memory_change_nothing(tiny_tokenizer, monkeypatch):
    host = scoring_host()
    together = tallied(host, tiny_tokenizer)["mixlora"]["tasks"]["toy"]
    alone = tallied(host, tiny_tokenizer, ["mixlora"], max_tokens=1)["mixlora"]["tasks"]["toy"]
    limit_rows(monkeypatch, 2)
    for other in (alone, tallied(host, tiny_tokenizer)["mixlora"]["tasks"]["toy"]):
        assert other["num_tokens"] == together["num_tokens"]
        assert other["num_questions_covered"] == together["num_questions_covered"]
        assert other["example"] == together["example"]
        torch.testing.assert_close(other["load"], together["load"])


def test_questions_whose_scores_were_kept_are_not_covered(tiny_tokenizer, tmp_path):
    host = scoring_host()
    cache = ScoreCache(tmp_path, host)
    score_questions(Scorer(host, tiny_tokenizer, NAMES, cache=cache), some_questions()[1:3])
    task = tallied(host, tiny_tokenizer, cache=cache)["mixlora"]["tasks"]["toy"]
    assert (task["num_questions"], task["num_questions_covered"]) == (5, 3)
    task = tallied(host, tiny_tokenizer, cache=cache)["mixlora"]["tasks"]["toy"]
    assert task == {"num_questions": 5, "num_questions_covered": 0, "num_tokens": 0}


def test_the_example_is_the_first_questions_context(summary):
    example = summary["mixlora"]["tasks"]["toy"]["example"]
    assert "".join(example["tokens"]).startswith(some_questions()[0].contexts[0])
    assert list(example["experts"]) == ["0", "1"]
    assert all(len(experts) == len(example["tokens"]) for experts in example["experts"].values())


def test_tasks_and_groups_of_questions_are_topics(tiny_tokenizer):
    host = scoring_host()
    (one,) = tallied(host, tiny_tokenizer, ["mixlora"]).values()
    assert one["specialisation"] == {}
    (two,) = tallied(host, tiny_tokenizer, ["mixlora"], tasks=("one", "two")).values()
    assert two["specialisation"]["topics"]["of"] == {"one": [0, 0], "two": [0, 0]}
    bits = two["specialisation"]["topics"]["bits"]
    assert len(bits) == len(two["layers"])
    assert all(0 <= value <= 1 for value in bits)
    groups = ["sums", "sums", None, "toy", "sums"]
    (grouped,) = tallied(host, tiny_tokenizer, ["mixlora"], groups=groups).values()
    assert set(grouped["specialisation"]["topics"]["of"]) == {"toy/sums", "toy"}
