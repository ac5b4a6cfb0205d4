"""Patterns of names: PEFT's own answers, and none that takes for ever."""

import signal

import pytest
from peft.utils.other import get_pattern_key

from loraloom.base.targets import matches
from loraloom.errors import FormatError
from loraloom.formats import read_adapter
from tests.formats.tiny import edit_config, llama_base, write

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.down_proj",
    "layers.1.mlp.up_proj",
    "q_proj",
    "layers.1.mlp.experts.3.lora_A",
]
PATTERNS = [
    "q_proj",
    "proj",
    "self_attn.q_proj",
    r"layers\.1\.mlp\.up_proj",
    "^model.layers.0.self_attn.q_proj",
    r".*\.model\.layers\.0\.self_attn\.q_proj",
    ".*_proj",
    r"(.*\.)?(q|k|v)_proj$",
    r"layers\.(0|11)\.(?:mlp|self_attn)\..*",
    r"layers\.\d+\.mlp\.\w+",
    r"layers\.[0-9]\..*?_proj",
    r"model\.layers\.[^.]+\.mlp\.(up|down)_proj",
    r"experts\.[12345]\.lora_A|(^q_proj|up_proj)",
    "a?b*",
    "",
]
HOSTILE = [r"(.*)\1", "(?=.*.*)a", "a{1,9}", "(", "[z-a]", "a" * 1001]
# Each of them takes `re` an age.
SLOW = [
    ".*" * 200 + "b",
    "(a|a)?" * 20 + "b",
    "(a*)*b",
    r"(([\w.]+)+)+!",
    "a?" * 60 + "a" * 60 + "b",
    r"(\w*\w*)?" * 20 + "b",
]


@pytest.fixture
def watchdog():
    """End a test that hangs."""

    def bite(*_):
        raise TimeoutError("not done in 100 s")

    before = signal.signal(signal.SIGALRM, bite)
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_what_it_does_in_peft(pattern):
    ours = [name for name in NAMES if matches(pattern, name)]
    assert ours == [name for name in NAMES if get_pattern_key([pattern], name) == pattern]


@pytest.mark.usefixtures("watchdog")
@pytest.mark.parametrize("pattern", SLOW)
def test_no_pattern_takes_for_ever(pattern):
    assert not matches(pattern, "layers.0." + "a" * 80)


@pytest.mark.usefixtures("watchdog")
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_other_patterns_in_files_are_refused(tmp_path, field):
    write(tmp_path, llama_base())
    for pattern in HOSTILE:
        edit_config(tmp_path, **{field: {pattern: 3}})
        with pytest.raises(FormatError, match="is not a regular expression"):
            read_adapter(tmp_path, llama_base())
