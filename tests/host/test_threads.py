"""Threads that share a host: changes take turns, and no forward sees half of one."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch

from loraloom.adapters import LoraConfig
from loraloom.errors import AdapterError
from loraloom.host import registry
from tests.tiny import METHODS, tiny_host, tiny_ids

IDS = tiny_ids(2)
LORAS = {"a": METHODS["lora"], "b": LoraConfig(rank=2, alpha=8)}


def meeting(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let two threads that run a function at once leave it together."""
    barrier = threading.Barrier(2)

    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        with suppress(threading.BrokenBarrierError):
            barrier.wait(0.3)
        return result

    return call


def outcomes(*calls: Callable[[], Any]) -> list[Any]:
    """Call functions at once, each in a thread; return results and errors."""

    def run(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except AdapterError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(run, calls))


def test_of_two_adapters_of_one_name_one_is_added(monkeypatch):
    host = tiny_host(configs={})
    monkeypatch.setattr(host._registry, "build", meeting(host._registry.build))
    results = outcomes(*[lambda: host.add("same", LoraConfig())] * 2)
    errors = [result for result in results if isinstance(result, AdapterError)]
    assert "'same' is taken" in str(*errors)
    assert host.adapters["same"] in results


def test_of_two_adapters_one_is_merged_and_unmerging_restores_the_base_model(monkeypatch):
    host = tiny_host(configs=LORAS)
    before = {name: tensor.clone() for name, tensor in host.model.state_dict().items()}
    monkeypatch.setattr(registry, "Merged", meeting(registry.Merged))
    results = outcomes(lambda: host.merge("a"), lambda: host.merge("b"))
    errors = [result for result in results if isinstance(result, AdapterError)]
    assert "without a merged adapter to merge another" in str(*errors)
    host.unmerge(host.merged)
    after = host.model.state_dict()
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == []


def test_an_adapter_that_is_merged_while_its_forward_waits_is_not_added_twice():
    host = tiny_host(configs=LORAS)
    waiting = []

    def merge(*_: Any) -> None:
        hook.remove()
        forward = lambda: outcomes(lambda: host(IDS, adapters=["a", "a"]))  # noqa: E731
        waiting.append(threads.submit(forward))
        with suppress(TimeoutError):
            waiting[0].result(0.3)
        host.merge("a")

    hook = host.model.model.register_forward_pre_hook(merge)
    with ThreadPoolExecutor(1) as threads:
        host(IDS)
        (result,) = waiting[0].result(10)
    assert "'a' is merged into the base model" in str(result)


@pytest.mark.parametrize("mode", [True, False])
def test_a_threads_mode_is_its_own(mode):
    host = tiny_host(configs={"a": LoraConfig(rank=3, alpha=6, dropout=0.5)})
    host.train(not mode)
    run = lambda: host(IDS, adapters=["a", "a"], sample_keys=[1, 2]).logits  # noqa: E731
    before = run()
    (other,) = outcomes(lambda: host.train(mode) and run())
    assert host.training is not mode
    assert torch.equal(run(), before)
    assert not torch.equal(other, before)
