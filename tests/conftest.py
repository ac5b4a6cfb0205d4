"""What tests of several packages share: a tiny tokenizer and the directory of real data."""

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from loraloom import adapters

_ROOT = Path(__file__).resolve().parent.parent

_CORPUS = [
    "Question: What color is the sky? Answer: blue",
    "Please choose the correct answer to the question: (A) one (B) two",
    "### Instruction: Write a short answer. ### Response: yes no true false",
]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of some 300 tokens; it adds neither BOS nor EOS by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of its own for each test, so that a test may change it."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The directory of real data: $LORALOOM_SHARED, or `shared` beside the repository."""
    directory = Path(os.environ.get("LORALOOM_SHARED", _ROOT.parent / "shared"))
    if not directory.is_dir():
        pytest.skip(f"no real data in {directory}; set LORALOOM_SHARED")
    return directory


@pytest.fixture(scope="session", autouse=True)
def _quick_disk() -> Iterator[None]:
    """Never wait for the disk, which others write to as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _session_cache(tmp_path_factory) -> Iterator[Path]:
    """Keep away from the user's cache; a GGUF file is dequantized once in a session."""
    home = tmp_path_factory.mktemp("session-cache")
    (home / "loraloom" / "gguf").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        yield home
    shutil.rmtree(home)


@pytest.fixture(autouse=True)
def _cache_of_its_own(_session_cache, tmp_path_factory, monkeypatch) -> None:
    """Keep scores away from other tests' scores."""
    home = tmp_path_factory.mktemp("cache")
    (home / "loraloom").mkdir()
    (home / "loraloom" / "gguf").symlink_to(_session_cache / "loraloom" / "gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))


@pytest.fixture(scope="module")
def browser():
    """A Chromium, where the machine has one."""
    browsers = pytest.importorskip("tests.report.browser", exc_type=ImportError)
    try:
        with browsers.chromium() as browser:
            yield browser
    except browsers.NoChromium as missing:
        pytest.skip(str(missing))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files of slow tests: at the end, no process waits long for the other."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


gc.disable()  # while libraries and tests are imported


def pytest_collection_finish() -> None:
    """Let the collector run seldom, and not over the million objects of the imported libraries."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    gc.enable()


@pytest.fixture
def methods_as_before():
    """Forget the methods and objectives that a test registers."""
    from loraloom.training.settings import OBJECTIVES

    lists = (adapters.CONFIGS, OBJECTIVES)
    known = [list(one) for one in lists]
    yield
    if known != list(lists):
        adapters.CONFIGS[:], OBJECTIVES[:] = known
        for listener in adapters.LISTENERS:
            listener()
