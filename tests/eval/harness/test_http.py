"""lm-eval's own client of OpenAI's API, in front of our server, has the results of our class."""

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

pytest.importorskip("tenacity", reason="lm-eval's clients need lm-eval[api]")

from loraloom.eval.harness import HostLM, load_tasks
from tests.serve.http.in_process import serving


def test_results_are_the_same_through_http(host, tiny_tokenizer, toy_tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    tiny_tokenizer.save_pretrained(tmp_path)
    adapter = next(iter(host.adapters))
    settings = {"task_manager": TaskManager(include_defaults=False), "bootstrap_iters": 0}
    arguments = {
        "model": adapter,
        "tokenizer": str(tmp_path),
        "tokenizer_backend": "huggingface",
        "batch_size": 4,
        "max_length": 200,
    }
    with serving(host, tiny_tokenizer) as (address, _):
        theirs = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={**arguments, "base_url": f"{address}/v1/completions"},
            tasks=load_tasks(["toy_choice"], toy_tasks),
            **settings,
        )
    ours = lm_eval.simple_evaluate(
        model=HostLM(host, tiny_tokenizer, adapter, max_length=200),
        tasks=load_tasks(["toy_choice"], toy_tasks),
        **settings,
    )
    samples = zip(ours["samples"]["toy_choice"], theirs["samples"]["toy_choice"], strict=True)
    for one, other in samples:
        assert one["acc"] == other["acc"]
        for (score, greedy), (other_score, other_greedy) in zip(
            one["filtered_resps"], other["filtered_resps"], strict=True
        ):
            assert score == pytest.approx(other_score, abs=1e-3)
            assert greedy == other_greedy
