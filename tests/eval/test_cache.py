import shutil

import pytest
import torch

from loraloom.adapters import LoraConfig
from loraloom.data.tokens import TokenPair
from loraloom.errors import ConfigError
from loraloom.eval.cache import FILE_NAME, ScoreCache, describe_adapters
from loraloom.eval.score import Scorer, score_questions
from tests.eval.scoring import question, record_forwards, scoring_host, some_questions
from tests.tiny import METHODS

ADAPTERS = [None, "lora", "mixlora"]


@pytest.fixture(scope="module")
def base():
    return scoring_host(configs={})


@pytest.fixture
def reopen(tmp_path, base):
    """Open the cache of the base model."""
    return lambda: ScoreCache(tmp_path / "cache", base)


def encoded(*continuations):
    return [TokenPair([1, 2], list(ids)) for ids in continuations]


def keep(cache, *tokens):
    """Keep a score of each token."""
    cache.add([(None, encoded([token]), (-float(token),)) for token in tokens])


def kept(cache, *tokens):
    """Those that are known."""
    found = cache.find([(None, encoded([token])) for token in tokens])
    return [token for token, values in zip(tokens, found, strict=True) if values == (-token,)]


def test_what_is_added_is_found_again_to_the_bit_by_all_its_tokens(reopen):
    values, nan = (-1.0 / 3, -1e-300), (float("nan"),)
    reopen().add([(None, encoded([3], [4, 5]), values), (None, encoded([3]), nan)])
    others = (encoded([3]), encoded([3], [4, 6]), encoded([3, 4], [5]), encoded([4, 5], [3]))
    found = reopen().find([(None, one) for one in (encoded([3], [4, 5]), *others)])
    assert found == [values, *[None] * 4]


@pytest.mark.parametrize(
    "change", [lambda content: content[: len(content) // 2], lambda _: b"junk"]
)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, reopen, change):
    path = tmp_path / "cache" / FILE_NAME
    keep(reopen(), *range(2000))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ConfigError, match=f"cached in .*{FILE_NAME}.* delete a damaged file"):
        kept(reopen(), *range(2000))


def test_a_directory_that_can_not_be_made_is_an_error(tmp_path, base):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"scores cannot be cached in .*, or pass --no-cache"):
        ScoreCache(tmp_path / "file" / "cache", base)


def test_what_is_kept_is_shared_and_may_be_deleted_at_any_time(tmp_path, reopen):
    cache, other = reopen(), reopen()
    keep(other, 3)
    keep(cache, 4)
    assert kept(reopen(), 3, 4) == [3, 4]
    shutil.rmtree(tmp_path / "cache")
    keep(cache, 5)
    assert kept(reopen(), 4, 5) == [5]


@pytest.fixture
def calls(monkeypatch):
    return record_forwards(monkeypatch)


def score(host, tokenizer, directory, adapters=ADAPTERS, questions=None, max_tokens=None, **rest):
    cache = ScoreCache(directory, host)
    asked = some_questions() if questions is None else questions
    scorer = Scorer(host, tokenizer, adapters, max_tokens, cache)
    return score_questions(scorer, asked, **rest), cache


def test_a_second_evaluation_computes_nothing_and_is_the_same(tiny_tokenizer, tmp_path, calls):
    host = scoring_host()
    first, cache = score(host, tiny_tokenizer, tmp_path)
    assert cache.num_found == 0
    assert first == score_questions(Scorer(host, tiny_tokenizer, ADAPTERS), some_questions())
    calls.clear()
    second, cache = score(scoring_host(), tiny_tokenizer, tmp_path)
    assert second == first
    assert (cache.num_found, calls) == (15, [])
    _, cache = score(host, tiny_tokenizer, tmp_path, [*ADAPTERS, "dora"])  # what is missing alone
    assert cache.num_found == 15
    host = scoring_host()
    lora = host.adapters["lora"]
    host.remove("mixlora")
    host.add("other", lora.config).load_tensors(lora.tensors())
    _, cache = score(host, tiny_tokenizer, tmp_path, ["other"])  # names and neighbours don't matter
    assert cache.num_found == 5


def test_an_interrupted_evaluation_goes_on_to_the_same_bits(tiny_tokenizer, tmp_path, calls):
    host = scoring_host(dtype=torch.bfloat16)
    asked = [question(f"Question {n}:" + " one" * n, ["A", "B"], index=n) for n in range(12)]
    unbroken = score_questions(Scorer(host, tiny_tokenizer, ADAPTERS, 256), asked)
    num_batches = len(calls)
    calls.clear()

    def stop(places):
        if len(calls) == 2:
            raise KeyboardInterrupt

    options = {"questions": asked, "max_tokens": 256}
    with pytest.raises(KeyboardInterrupt):
        score(host, tiny_tokenizer, tmp_path, on_progress=stop, **options)
    resumed, _ = score(host, tiny_tokenizer, tmp_path, **options)
    assert resumed == unbroken
    assert len(calls) == num_batches > 3


@pytest.mark.parametrize("change", ["adapter", "merged", "dtype", "attention", "window"])
def test_another_computation_is_not_taken_for_it(tiny_tokenizer, tmp_path, change):
    configs = {"lora": METHODS["lora"]}
    adapters = [None] if change == "merged" else ["lora"]
    for num_found in (0, 5):
        host = scoring_host(configs=configs)
        _, cache = score(host, tiny_tokenizer, tmp_path, adapters)
        assert cache.num_found == num_found
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 99.0}}
    dtype = torch.float32 if change == "dtype" else torch.float64
    host = scoring_host(configs=configs, dtype=dtype, **(rope if change == "window" else {}))
    if change == "adapter":
        next(iter(host.adapters["lora"].parameters())).data.view(-1)[-1] += 1
    if change == "merged":
        host.merge("lora")
    if change == "attention":
        host.model.set_attn_implementation("eager")
    _, cache = score(host, tiny_tokenizer, tmp_path, adapters)
    assert cache.num_found == 0


def test_scores_of_another_packages_method_are_not_reused(tiny_tokenizer, tmp_path):
    theirs = type("Theirs", (LoraConfig,), {"__doc__": "Theirs.", "__module__": __name__})
    for _ in range(2):
        host = scoring_host(configs={"lora": theirs(rank=2)})
        _, cache = score(host, tiny_tokenizer, tmp_path, ["lora"])
        assert cache.num_found == 0


def test_an_adapter_is_known_by_all_files_that_it_is_read_from(tmp_path):
    read = {"adapter_config.json", "adapter_model.bin", "mixlora_model.safetensors", "config.yml"}
    for name in (*read, "README.md"):
        (tmp_path / name).write_text(name)
    described = describe_adapters({"mix": str(tmp_path)})["mix"]
    assert described["path"] == str(tmp_path)
    assert described["sha256"].keys() == read
    assert len({*described["sha256"].values()}) == len(read)
