"""The pretend device itself: it refuses, notes and computes."""

import pytest
import torch

from tests.device.pretend import PretendError, on_cpu


def test_a_cpu_tensor_with_a_devices_is_an_error(accelerator):
    ours = torch.ones(3, device=accelerator.device)
    with pytest.raises(PretendError, match="pretend:0 and cpu"):
        ours + torch.ones(3)
    with pytest.raises(PretendError, match="pretend:0 and cpu"):
        torch.ones(3).add_(ours)
    assert on_cpu(ours + torch.tensor(2.0)).tolist() == [3, 3, 3]


def test_reads_and_uploads_are_noted(accelerator):
    ours = torch.zeros(3, device=accelerator.device)
    with accelerator.step("upload"):
        ours += torch.ones(3).to(accelerator.device)
    with accelerator.step("read"):
        assert ours.sum().item() == 3
    with accelerator.step("mask"):
        assert len(ours[ours > 0]) == 3
    assert accelerator.counts("upload") == {"upload": 1}
    assert accelerator.counts("read") == {"read": 1}
    assert accelerator.counts("mask") == {"sync": 1}


def test_a_number_set_by_an_index_waits_and_by_a_slice_does_not(accelerator):
    ours = torch.zeros(3, device=accelerator.device)
    with accelerator.step("index"):
        ours[-1] = 2
    with accelerator.step("slice"):
        ours[:1] = 2
    assert accelerator.counts("index") == {"upload": 1}
    assert accelerator.counts("slice") == {}
    assert on_cpu(ours).tolist() == [2, 0, 2]


def test_the_device_is_torchs_accelerator(accelerator):
    assert torch.accelerator.current_accelerator() == torch.device("pretend")
