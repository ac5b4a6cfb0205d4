"""lm-eval's own client of OpenAI's API, in front of our server, has the results of our class."""

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

pytest.importorskip("tenacity", reason="lm-eval's clients need lm-eval[api]")

from loraloom.eval.harness import HostLM, load_tasks
from tests.eval.harness.test_lm import assert_same_scores
from tests.serve.http.in_process import serving


def test_results_are_the_same_through_http(host, tiny_tokenizer, toy_tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    tiny_tokenizer.save_pretrained(tmp_path)
    adapter = next(iter(host.adapters))

    def samples(model, **options):
        options |= {"task_manager": TaskManager(include_defaults=False), "bootstrap_iters": 0}
        tasks = load_tasks(["toy_choice"], toy_tasks)
        return lm_eval.simple_evaluate(model, tasks=tasks, **options)["samples"]["toy_choice"]

    arguments = {"model": adapter, "tokenizer": str(tmp_path), "tokenizer_backend": "huggingface"}
    arguments |= {"batch_size": 4, "max_length": 256}
    with serving(host, tiny_tokenizer) as (address, _):
        arguments["base_url"] = f"{address}/v1/completions"
        theirs = samples("local-completions", model_args=arguments)
    ours = samples(HostLM(host, tiny_tokenizer, adapter))
    for one, other in zip(ours, theirs, strict=True):
        assert one["acc"] == other["acc"]
        assert_same_scores(one["filtered_resps"], other["filtered_resps"], 1e-3)
