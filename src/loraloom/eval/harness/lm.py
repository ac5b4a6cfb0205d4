"""Adapters on a host as lm-evaluation-harness asks models, one at a time.

What one adapter is asked is computed for all at once, and kept until the others are asked it.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, TypedDict, Unpack, cast
from unittest.mock import patch

import lm_eval
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from loraloom.config.fields import checked
from loraloom.data.templates import ChatTemplate
from loraloom.data.tokens import TokenPair
from loraloom.errors import ConfigError, DataError, not_finite
from loraloom.generation import scoring
from loraloom.generation.generate import complete
from loraloom.generation.request import GenerationRequest
from loraloom.generation.sampling import SamplingConfig
from loraloom.host.choice import Choice
from loraloom.host.host import Host
from loraloom.terminal import make_console, show_progress

# Most tokens of continuations in one row; attention's cost is quadratic in a row.
_TOKENS_BESIDE_CONTEXT = 512


class SimpleEvaluateOptions(TypedDict, total=False):
    """Arguments of `lm_eval.simple_evaluate` that `evaluate_adapters` passes on."""

    num_fewshot: int | None
    max_batch_size: int | None
    use_cache: str | None
    cache_requests: bool
    rewrite_requests_cache: bool
    delete_requests_cache: bool
    limit: int | float | None
    samples: dict[str, list[int]] | None
    bootstrap_iters: int
    check_integrity: bool
    write_out: bool
    log_samples: bool
    evaluation_tracker: EvaluationTracker | None
    system_instruction: str | None
    apply_chat_template: bool | str
    fewshot_as_multiturn: bool
    gen_kwargs: str | dict[str, str | float | int] | None
    verbosity: str | None
    predict_only: bool
    random_seed: int
    numpy_random_seed: int
    torch_random_seed: int
    fewshot_random_seed: int
    confirm_run_unsafe_code: bool
    metadata: dict[str, Any] | None


class Answers:
    """Answers of several adapters on a host, each different request computed for all at once."""

    def __init__(
        self,
        host: Host,
        tokenizer: PreTrainedTokenizerBase,
        adapters: Sequence[str | None],
        max_tokens_per_batch: int | None = None,
        batch_size: int = 16,
    ):
        self.adapters = list(dict.fromkeys(adapters))
        self._host = host
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._max_tokens = max_tokens_per_batch or scoring.tokens_per_batch(host)
        self._answers: dict[Any, Any] = {}  # by adapter and request, until they are asked for

    def of(self, adapter: str | None, requests: Sequence[Any], kind: str, quiet: Any) -> list[Any]:
        """Score pairs of tokens (a PairScore each), or do completions (texts), with an adapter."""
        unique = list(dict.fromkeys(requests))
        missing = [request for request in unique if (adapter, request) not in self._answers]
        console = make_console(stderr=True)
        is_shown = console.is_terminal and not quiet
        with show_progress(console if is_shown else None, kind, [1] * len(missing)) as advance:
            if kind == "generate_until":
                self._complete(missing, advance)
            else:
                self._score(missing, advance)
        answers = {request: self._answers.pop((adapter, request)) for request in unique}
        return [answers[request] for request in requests]

    def _complete(self, requests: list[Any], advance: Any) -> None:
        keys = list(product(requests, self.adapters))
        rows = []
        for (prompt_ids, sampling, draw), adapter in keys:
            choice = Choice(adapter)
            rows.append(GenerationRequest(list(prompt_ids), choice, "", sampling, draw))
        completions = complete(self._host, self._tokenizer, rows, batch_size=self._batch_size)
        for (request, adapter), completion in zip(keys, completions, strict=True):
            self._answers[adapter, request] = completion.text
        advance(range(len(requests)))

    def _score(self, requests: list[Any], advance: Any) -> None:
        groups = _group_by_context(requests)
        pairs = [[TokenPair(*map(list, request)) for request in group] for group in groups]
        rows = scoring.group_rows(self._host, pairs)
        tokens_per_adapter = self._max_tokens // len(self.adapters)
        for indices in scoring.token_batches(rows, tokens_per_adapter):
            keys = list(product(self.adapters, indices))
            scores = scoring.score_groups(self._host, rows, keys, self._max_tokens)
            for (adapter, index), group_scores in zip(keys, scores, strict=True):
                for request, score in zip(groups[index], group_scores, strict=True):
                    self._answers[adapter, request] = score
            for index in indices:
                advance(range(len(groups[index])))


def _group_by_context(requests: list[Any]) -> list[list[Any]]:
    """Put continuations of the same context together, as many as a row should hold."""
    groups: dict[Any, list[Any]] = {}
    num_tokens: Counter[Any] = Counter()
    for context, continuation in requests:
        num_tokens[context] += len(continuation)
        # a context of very many continuations is read several times, in rows of bounded length
        row = num_tokens[context] // _TOKENS_BESIDE_CONTEXT
        groups.setdefault((context, row), []).append((context, continuation))
    return [*groups.values()]


_HFLM: Any = HFLM  # the decorator that registers it hides what it is


class HostLM(_HFLM):
    """An adapter on a host, or its base model.

    Prompts, windows, chat templates and their settings are those of lm-eval's own class for
    transformers models. Log-likelihoods are computed from float32 logits, and continuations of a
    context share its computation.
    """

    def __init__(
        self,
        host: Host,
        tokenizer: PreTrainedTokenizerBase,
        adapter: str | None = None,
        *,
        max_tokens_per_batch: int | None = None,
        batch_size: int = 16,
        answers: Answers | None = None,
    ):
        # HFLM's own loads a model, puts it into evaluation mode and gives the tokenizer a pad token
        TemplateLM.__init__(cast("Any", self))
        self.host = host
        self.adapter = adapter
        self.answers = answers or Answers(
            host, tokenizer, [adapter], max_tokens_per_batch, batch_size
        )
        # what HFLM's own methods read
        self.tokenizer: Any = tokenizer
        self.backend = "causal"
        self.add_bos_token = None
        self.enable_thinking = None
        self.custom_prefix_token_id = None
        self.batch_size_per_gpu = batch_size
        self.chat_template_args: dict[str, Any] = {}
        self._ends: tuple[str, ...] = ()  # of turns, in a template that is applied
        self._max_length = host.config.max_position_embeddings
        self._model = host.model
        self._config = host.config
        self._device = host.device
        self._rank = 0
        self._world_size = 1

    def get_model_info(self) -> dict[str, Any]:
        return {
            "base_model": self.host.base.name_or_path,
            "base_fingerprint": self.host.base.fingerprint,
            "adapter": self.adapter,
            "model_dtype": str(self.host.dtype).removeprefix("torch."),
        }

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Turn a conversation into a prompt, as the adapter's training data wrote prompts."""
        template = _chat_template(self.host, self.tokenizer, self.adapter)
        if template != self.tokenizer.chat_template:
            self.chat_template_args["chat_template"] = template
        if not template:
            raise ConfigError("apply_chat_template needs a tokenizer with a chat template")
        # Not a file's name: the text may be from an adapter's files.
        end = ChatTemplate(self.tokenizer, template).turn_end()
        self._ends = (end,) if end else ()
        return super().apply_chat_template(chat_history, add_generation_prompt)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        keys = []
        for _, context, continuation in requests:
            # a context of blanks has no token of its own
            pair = TokenPair(context or [self.prefix_token_id], continuation)
            keys.append(tuple(map(tuple, scoring.fit_pair(pair, self.max_length))))
        scores = self.answers.of(self.adapter, keys, "loglikelihood", disable_tqdm)
        for score in scores:
            if not math.isfinite(score.log_likelihood):
                raise not_finite("log-likelihoods", score.log_likelihood, [self.adapter])
        return [tuple(score) for score in scores]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        keys = []
        for index, request in enumerate(requests):
            text, settings = cast("Any", request.args)
            keys.append(self._completion(text, settings, index))
        return self.answers.of(self.adapter, keys, "generate_until", disable_tqdm)

    def _completion(self, text: str, settings: Mapping[str, Any], index: int) -> tuple[Any, ...]:
        sampling = parse_generation(settings, self.max_gen_toks)
        sampling = sampling.model_copy(update={"stop": (*sampling.stop, *self._ends)})
        length = min(self.max_length, self.host.max_positions)
        room = length - sampling.max_new_tokens
        if room < 1:
            raise DataError(
                f"max_gen_toks must leave room for a prompt in the model's {length} "
                f"tokens, got {sampling.max_new_tokens}"
            )
        ids = self.tok_encode(text) or [self.prefix_token_id]
        # by the index, the random draws of equal prompts are apart
        return tuple(ids)[-room:], sampling, index if sampling.temperature > 0 else 0


def _chat_template(host: Host, tokenizer: PreTrainedTokenizerBase, adapter: str | None) -> Any:
    form = None if adapter is None else host.adapter(adapter).prompt
    template: Any = tokenizer.chat_template
    return template if form is None else form.as_chat_template(template, adds_bos=False)


def parse_generation(settings: Mapping[str, Any], max_new_tokens: int) -> SamplingConfig:
    normal: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), max_new_tokens))
    stop = dict.fromkeys(filter(None, normal.pop("until")))
    sampling = {"max_new_tokens": normal.pop("max_gen_toks"), "stop": tuple(stop)}
    do_sample = normal.pop("do_sample")
    if do_sample and float(normal.setdefault("temperature", 1.0)) == 0:
        raise ConfigError("generation_kwargs: do_sample requires temperature above 0, got 0")
    for name, value in normal.items():
        is_read = do_sample or name not in ("temperature", "top_k", "top_p")
        if is_read and value is not None:
            sampling[name] = value
    return checked(SamplingConfig, sampling)


def evaluate_adapters(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task | Group],
    adapters: Sequence[str | None],
    *,
    max_tokens_per_batch: int | None = None,
    batch_size: int = 16,
    **options: Unpack[SimpleEvaluateOptions],
) -> dict[str | None, dict[str, Any]]:
    """Evaluate adapters on tasks: the same results as one by one, computed in the same batches.

    Args:
        host: Base model with the adapters.
        tokenizer: Tokenizer of the base model.
        tasks: Tasks and groups that `load_tasks` returned.
        adapters: Names of adapters; None is the base model.
        max_tokens_per_batch: Number of tokens scored at once, with padding and all adapters.
            Default: 1,024 on a CPU, 16,384 elsewhere.
        batch_size: Number of prompts completed at once.
        **options: Arguments of `lm_eval.simple_evaluate`, such as `limit` and `num_fewshot`.

    Returns:
        The results of `lm_eval.simple_evaluate`, by adapter.
    """
    # Adapters whose prompts differ have no requests in common.
    groups: dict[Any, list[str | None]] = {}
    for name in adapters:
        template = None
        if options.get("apply_chat_template"):
            template = str(_chat_template(host, tokenizer, name))
        groups.setdefault(template, []).append(name)
    models: dict[str | None, Any] = {}
    for names in groups.values():
        answers = Answers(host, tokenizer, names, max_tokens_per_batch, batch_size)
        for name in names:
            models[name] = HostLM(host, tokenizer, name, answers=answers)
    # the tasks are there, so none is looked up
    manager = TaskManager(include_defaults=False)
    evaluate = cast("Any", lm_eval.simple_evaluate)  # its decorator hides what it takes
    # lm-eval's own lets git complain on stderr where the working directory is no repository
    with patch("lm_eval.evaluator.get_git_commit_hash", lambda: None):
        return {
            name: evaluate(model=models[name], tasks=list(tasks), task_manager=manager, **options)
            for name in dict.fromkeys(adapters)
        }
