"""lm-eval's own client of OpenAI's API, in front of our server, has the results of our class."""

from __future__ import annotations

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

pytest.importorskip("tenacity", reason="lm-eval's clients need lm-eval[api]")

from loraloom.eval.harness import HostLM, load_tasks
from tests.serve.http.in_process import serving


@pytest.mark.parametrize("name", ["toy_choice", "toy_generate"])
def test_tasks_have_the_same_results_through_http(
    host, tiny_tokenizer, toy_tasks, tmp_path, monkeypatch, name
):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    tiny_tokenizer.save_pretrained(tmp_path)
    adapter = next(iter(host.adapters))
    settings = {
        "tasks": load_tasks([name], toy_tasks),
        "task_manager": TaskManager(include_defaults=False),
        "bootstrap_iters": 0,
    }
    with serving(host, tiny_tokenizer) as (address, _):
        arguments = {
            "base_url": f"{address}/v1/completions",
            "model": adapter,
            "tokenizer": str(tmp_path),
            "tokenizer_backend": "huggingface",
            "batch_size": 4,
            "max_length": 200,
        }
        theirs = lm_eval.simple_evaluate(
            model="local-completions", model_args=arguments, **settings
        )
    settings["tasks"] = load_tasks([name], toy_tasks)
    ours = lm_eval.simple_evaluate(
        model=HostLM(host, tiny_tokenizer, adapter, max_length=200), **settings
    )
    for one, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
        if name == "toy_generate":
            assert one["filtered_resps"] == other["filtered_resps"]
        else:
            assert one["acc"] == other["acc"]
            pairs = zip(one["filtered_resps"], other["filtered_resps"], strict=True)
            for (score, is_greedy), (other_score, other_greedy) in pairs:
                assert score == pytest.approx(other_score, abs=1e-3)
                assert is_greedy == other_greedy
