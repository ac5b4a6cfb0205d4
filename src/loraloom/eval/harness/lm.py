"""An adapter on a host, as lm-evaluation-harness asks models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import lm_eval.models  # noqa: F401  lm-eval's own models, which it leaves out once one is registered
from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from loraloom.data.tokenising import TokenPair, eos_token
from loraloom.errors import ConfigError, DataError, not_finite
from loraloom.eval.harness.answers import Answers, CompletionRequest, ScoreRequest
from loraloom.eval.harness.arguments import load_arguments
from loraloom.eval.harness.requests import RequestEncoder, parse_generation
from loraloom.infer.rows import fit_pair
from loraloom.models.host import Host

MAX_NEW_TOKENS = 256
"""Of a completion whose task doesn't say; lm-eval's own default."""


class HostLM(TemplateLM):
    """An adapter on a host, or its base model.

    Prompts are cut from the left and encoded as lm-eval's own class for transformers models does
    it; log-likelihoods are computed from float32 logits. Continuations of a context share its
    computation.
    """

    def __init__(
        self,
        host: Host,
        tokenizer: PreTrainedTokenizerBase,
        adapter: str | None = None,
        *,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        max_tokens_per_batch: int | None = None,
        batch_size: int = 16,
        chat_template_args: Mapping[str, Any] | None = None,
        answers: Answers | None = None,
    ):
        super().__init__()
        self.host = host
        self.tokenizer: Any = tokenizer
        self.adapter = adapter
        self.max_length = _check_length(host, max_length)
        self.batch_size = batch_size
        self._device = host.device
        self._encoder = RequestEncoder(tokenizer, add_bos_token, prefix_token_id)
        self._chat_template_args = dict(chat_template_args or {})
        self._answers = answers or Answers(
            host, tokenizer, [adapter], max_tokens_per_batch, batch_size
        )

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict | None = None
    ) -> HostLM:
        """Load a model from `--model_args`; see `load_arguments`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> HostLM:
        """Load a model from the arguments of lm-eval's command line; see `load_arguments`."""
        host, tokenizer, adapter, options = load_arguments(arg_dict, additional_config or {})
        return cls(host, tokenizer, adapter, **options)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return eos_token(self.tokenizer)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        return self._encoder.prefix_token_id

    @property
    def max_gen_toks(self) -> int:
        """Most tokens of a completion whose task doesn't say."""
        return MAX_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval tells caches of requests apart by."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval notes of the model."""
        return {
            "base_model": self.host.base.name_or_path,
            "base_fingerprint": self.host.base.fingerprint,
            "adapter": self.adapter,
            "model_dtype": str(self.host.dtype).removeprefix("torch."),
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text."""
        if add_special_tokens is None:
            return self._encoder.encode([string])[0]
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Turn a conversation into a prompt; no system turn where the template takes none."""
        if not self._chat_template:
            raise ConfigError(
                "apply_chat_template needs a tokenizer with a chat template, got one without"
            )
        try:
            return self._render(chat_history, add_generation_prompt)
        except TemplateError:
            turns = [message for message in chat_history if message["role"] != "system"]
            return self._render(turns, add_generation_prompt)

    @property
    def _chat_template(self) -> str | None:
        """How the adapter's training data wrote prompts, or else the tokenizer's own."""
        form = None if self.adapter is None else self.host.adapter(self.adapter).prompt
        own = self.tokenizer.chat_template
        if form is None or not (own is None or isinstance(own, str)):
            return own
        return form.as_chat_template(own, adds_bos=False)

    def _render(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            chat_template=self._chat_template,
            **self._chat_template_args,
        )

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Score continuations of contexts: log-likelihood, and whether it is the greedy one."""
        texts: list[Any] = [request.args for request in requests]
        pairs = self._encoder.encode_pairs(texts)
        return self._loglikelihood_tokens(
            [
                (text, pair.context, pair.continuation)
                for text, pair in zip(texts, pairs, strict=True)
            ],
            disable_tqdm,
        )

    def _loglikelihood_tokens(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
    ) -> list[tuple[float, bool]]:
        pairs = [TokenPair(context, continuation) for _, context, continuation in requests]
        scores = self._score(pairs, "loglikelihood", disable_tqdm)
        for (texts, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Score whole texts, in windows as long as the model reads."""
        windows = [
            [
                TokenPair(*make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    ids, self.prefix_token_id, self.max_length, context_len=1
                )
            ]
            for ids in self._encoder.encode([request.args[0] for request in requests])
        ]
        pairs = [pair for of_text in windows for pair in of_text]
        scores = iter(self._score(pairs, "loglikelihood_rolling", disable_tqdm))
        sums = [math.fsum(next(scores)[0] for _ in of_text) for of_text in windows]
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def _score(
        self, pairs: Sequence[TokenPair], what: str, quiet: bool
    ) -> list[tuple[float, bool]]:
        fitted = [ScoreRequest(*map(tuple, fit_pair(pair, self.max_length))) for pair in pairs]
        with self._progress(len(fitted), what, quiet) as tell:
            scores = self._answers.score(self.adapter, fitted, tell)
        for score in scores:
            if not math.isfinite(score.log_likelihood):
                raise not_finite("log-likelihoods", score.log_likelihood, [self.adapter])
        return [(log_likelihood, is_greedy) for log_likelihood, is_greedy in scores]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Complete prompts up to their stop texts."""
        asked: list[Any] = [request.args for request in requests]
        encoded = self._encoder.encode([text for text, _ in asked])
        prompts = [
            self._completion(ids, settings, place)
            for place, (ids, (_, settings)) in enumerate(zip(encoded, asked, strict=True))
        ]
        with self._progress(len(prompts), "generate_until", disable_tqdm) as tell:
            texts = self._answers.complete(self.adapter, prompts, tell)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _completion(
        self, ids: list[int], settings: Mapping[str, Any], place: int
    ) -> CompletionRequest:
        sampling = parse_generation(settings, self.max_gen_toks)
        room = self.max_length - sampling.max_new_tokens
        if room < 1:
            raise DataError(
                f"max_gen_toks must leave room for a prompt in the model's {self.max_length} "
                f"tokens, got {sampling.max_new_tokens}"
            )
        draw = place if sampling.temperature > 0 else 0
        prompt = tuple(ids or [self.prefix_token_id])[-room:]
        return CompletionRequest(prompt, sampling, draw)

    @contextmanager
    def _progress(self, total: int, what: str, quiet: bool) -> Iterator[Callable[[int], Any]]:
        """Show a bar on a terminal; give what tells it how many are done."""
        with cast("Any", tqdm)(total=total, desc=what, disable=quiet or None) as bar:
            yield lambda num_done: bar.update(num_done - bar.n)
            bar.update(total - bar.n)


register_model("loraloom")(HostLM)


def shared_lms(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    adapters: Sequence[str | None],
    *,
    max_tokens_per_batch: int | None = None,
    batch_size: int = 16,
    **options: Any,
) -> dict[str | None, HostLM]:
    """Make a model of each adapter; what one is asked is computed for all in the same batches.

    The answers for the others are kept until they are asked the same, as long as their weights
    don't change.
    """
    answers = Answers(host, tokenizer, adapters, max_tokens_per_batch, batch_size)
    return {
        name: HostLM(host, tokenizer, name, batch_size=batch_size, answers=answers, **options)
        for name in answers.adapters
    }


def _check_length(host: Host, max_length: int | None) -> int:
    longest = host.config.max_position_embeddings
    if max_length is None:
        return longest
    if not 1 <= max_length <= longest:
        raise ConfigError(
            f"max_length must be in [1, {longest}], as the model reads no more, got {max_length}"
        )
    return max_length
