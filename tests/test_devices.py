from types import SimpleNamespace

import pytest
import torch

from loraloom import devices
from loraloom.errors import ConfigError
from loraloom.host.host import Host
from loraloom.training.rounds import RoundRunner
from tests.training.toy import PAD_ID, toy_host


@pytest.fixture(params=["cuda:0", "xpu:0"])
def accelerator(request, monkeypatch):
    """An accelerator of 16 GB, of which this process holds 5, and a host on it."""
    fake = SimpleNamespace(device=torch.device(request.param), share=0.9, num_emptied=0)

    def set_share(share, device):
        assert device == fake.device
        fake.share = share

    module = SimpleNamespace(
        mem_get_info=lambda device: (9 * 10**9, 16 * 10**9),
        set_per_process_memory_fraction=set_share,
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda device: 5 * 10**9)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    empty = lambda: setattr(fake, "num_emptied", fake.num_emptied + 1)  # noqa: E731
    monkeypatch.setattr(torch.accelerator, "empty_cache", empty)
    fake.host = toy_host()
    monkeypatch.setattr(Host, "device", fake.device)
    return fake


def test_a_memory_limit_bounds_an_accelerators_allocations(accelerator):
    RoundRunner(accelerator.host, PAD_ID, memory_limit=8 * 10**9)
    assert accelerator.share == 0.5
    RoundRunner(accelerator.host, PAD_ID, memory_limit=10**11)
    assert accelerator.share == 1.0


def test_a_memory_limit_is_compared_with_what_an_accelerator_holds(accelerator):
    with pytest.raises(ConfigError, match=r"optimizers keep, 5\.00 GB, got 4\.00 GB"):
        RoundRunner(accelerator.host, PAD_ID, memory_limit=4 * 10**9)


def test_free_memory_empties_the_accelerators_cache(accelerator):
    devices.free_memory()
    assert accelerator.num_emptied == 1
