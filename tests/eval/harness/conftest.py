"""A host in float32 and toy tasks; without lm-eval these tests are left out."""

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

import datasets

from tests.eval.harness.toy import write_tasks
from tests.eval.scoring import scoring_host


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    """Keep what datasets converts out of the user's cache."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="session")
def toy_tasks(tmp_path_factory):
    """The directory of the toy tasks."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session")
def host():
    return scoring_host(dtype=torch.float32)
