"""Rows of the base model and of many adapters, continued together (B rows, L tokens, V vocabulary).

A step schedules rows (some are sent back, others admitted), decodes those that are under way and
reads pieces of others' prompts, and then chooses a token for every row that is read.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraloom.adapters.contract import Adapter
from loraloom.devices import free_memory
from loraloom.errors import DataError, not_finite
from loraloom.generation.prompts import check_token_ids
from loraloom.generation.request import (
    GenerationRequest,
    RequestError,
    Row,
    Share,
    Sink,
    log_failure,
)
from loraloom.generation.runner import Runner
from loraloom.generation.sampling import TokenLogProb, TokenRule, choose_tokens, end_tokens
from loraloom.generation.scheduler import EngineLimits, Scheduler
from loraloom.generation.scoring import too_large
from loraloom.generation.tenants import has_place
from loraloom.host.choice import MAX_PROMPT, Choice
from loraloom.host.forward import Record
from loraloom.host.host import Host
from loraloom.host.layout import RowAdapter, rows_in_record
from loraloom.routing.record import choices_by_token, join_routing

# Tokens that a row generates at least before it gives way to others.
MIN_TURN = 16
# Tokens that are read in about the time in which one is generated; a GPU reads more.
READ_PER_TOKEN = 8
READ_PER_TOKEN_ON_GPU = 128
# Tokens of a prompt that are worth a forward.
MIN_PIECE = 32


@dataclass(eq=False)
class Routing:
    """A prompt for which a router is to choose."""

    prompt_ids: Sequence[int]
    adapter: RowAdapter
    share: Share
    choice: Future[Choice] = field(default_factory=Future)
    num_left: int = 1
    """Tokens at least that must be readable; its prompt is read at once."""


class Engine:
    """Continues rows; any thread may `submit` and set `is_cancelled`, one thread calls `step`."""

    def __init__(self, host: Host, tokenizer: PreTrainedTokenizerBase, limits: EngineLimits):
        self.host = host
        self.limits = limits
        self.counts: Counter[tuple[str, ...]] = Counter()
        """What only grows, by a metric's name and labels."""
        self.on_end: Callable[[Row], object] = lambda row: None
        self._tokenizer = tokenizer  # a fast one may be used by one thread at a time
        self._ends = end_tokens(host, tokenizer)
        self._wake = threading.Condition()  # with a lock that its holder may take again
        self._scheduler = Scheduler(limits)
        on_cpu = host.device.type == "cpu"
        self._read_per_token = READ_PER_TOKEN if on_cpu else READ_PER_TOKEN_ON_GPU
        self._arrivals = count(1)
        self._served: list[Row] = []  # in the order in which they were admitted
        self._runner = Runner(host, limits)
        self._gone: list[Adapter] = []
        self._routings: list[Routing] = []
        self._crowded_out: list[Row] = []  # of a queue that was full
        self._is_stopping = False

    @property
    def max_length(self) -> int:
        return min(self.host.max_positions, self.limits.cache_tokens)

    @property
    def is_idle(self) -> bool:
        waiting = self._scheduler.line or self._routings or self._crowded_out
        return not (waiting or self._gone or self._served)

    def gauges(self) -> dict[str, int]:
        """What goes up and down, by a metric's name."""
        return {
            "requests_running": len(self._served),
            "requests_waiting": len(self._scheduler.line),
            "adapters_loaded": len(self.host.adapters),
            "cache_tokens": self.limits.cache_tokens,
            "cache_tokens_used": self._scheduler.cached_tokens(self._served),
            "cache_tokens_kept": self._runner.prefixes.num_tokens,
        }

    def submit(
        self, request: GenerationRequest, sink: Sink, on_gone: Callable[[], object] = lambda: None
    ) -> Row:
        """Let a request wait; `on_gone` is called once it is over, and uses its adapter no more."""
        self._check(request)
        (choice,) = self.host.choose([request.prompt_ids], [request.adapter])
        if choice.probabilities is not None:
            request = replace(request, choice=choice)
        row = Row(request, self._tokenizer, self._ends, sink, on_gone)
        with self._wake:
            self._make_place(row.share.tenant)
            row.arrival = next(self._arrivals)
            self._scheduler.add(row)
            self._wake.notify_all()
        return row

    def _make_place(self, tenant: str) -> None:
        """In a full queue, whoever has most of it gives way to whoever has less than their part."""
        most = self.limits.max_waiting + max(0, self._scheduler.max_rows - len(self._served))
        line = self._scheduler.line
        if len(line) < most:
            return
        row = self._scheduler.crowding()
        if row is None or not has_place(line.counts, tenant, most):
            raise self._queue_is_full()
        self._scheduler.remove(row)
        self._crowded_out.append(row)

    def _queue_is_full(self) -> RequestError:
        return RequestError(
            f"the request queue is full ({self.limits.max_waiting} completions); retry later, or "
            "request fewer completions at once",
            "queue_full",
        )

    def choose(
        self, prompt_ids: Sequence[int], adapter: RowAdapter, share: Share
    ) -> Future[Choice]:
        """Let an adapter's router choose what answers a prompt, as a piece of work of a tenant."""
        routing = Routing(prompt_ids, adapter, share)
        with self._wake:
            self._scheduler.line.lift(share.tenant)
            self._routings.append(routing)
            self._wake.notify_all()
        return routing.choice

    def forget(self, adapter: Adapter) -> None:
        with self._wake:
            self._gone.append(adapter)
            self._wake.notify_all()

    def stop(self) -> None:
        """Let `run` return when the requests that are there have ended."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify_all()

    def run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._is_stopping or not self.is_idle)
                if self.is_idle:
                    return
            try:
                self.step()
            except Exception as error:
                log_failure("a step failed", error)
                served, self._served = self._served, []
                self._runner.take_apart(served)
                for row in served:
                    self._fail(row, error)

    def step(self) -> bool:
        self.counts["steps",] += 1
        self._drop_ended()
        self._schedule()
        self._decode()
        self._read()
        self._postprocess()
        if self.is_idle:  # memory that ran out is there again
            self._scheduler.max_rows = self.limits.max_rows
        return not self.is_idle

    def _check(self, request: GenerationRequest) -> None:
        num_prompt = len(request.prompt_ids)
        num_new = request.sampling.max_new_tokens if request.makes_tokens else 0
        if num_prompt == 0:
            raise DataError("the prompt must not be empty")
        check_token_ids(request.prompt_ids, self.host.config.vocab_size, "prompt")
        check_token_ids([*request.logit_bias], self.host.config.vocab_size, "logit_bias")
        if num_prompt + num_new > self.max_length:
            raise RequestError(
                # litellm recognizes the first five words
                f"this model's maximum context length is {self.max_length} tokens, but the prompt "
                f"has {num_prompt} and max_tokens is {num_new}; shorten the prompt or lower "
                "max_tokens",
                "context_length_exceeded",
            )

    def _drop_ended(self) -> None:
        with self._wake:
            gone, self._gone = self._gone, []
            crowded_out, self._crowded_out = self._crowded_out, []
            for row in [row for row in self._scheduler.line if self._is_over(row)]:
                self._scheduler.remove(row)
        for row in crowded_out:
            self._fail(row, self._queue_is_full())
        # here, as no forward uses what was prepared of them between two steps
        for adapter in gone:
            self._runner.prepared.forget(adapter)
        self._leave([row for row in self._served if self._is_over(row)])

    def _is_over(self, row: Row) -> bool:
        if row.is_cancelled:
            self._end(row, "cancelled")
            return True
        limit_s = self.limits.max_request_s
        is_late = time.monotonic() - row.request.arrived_s > limit_s
        if is_late:
            self._fail(row, RequestError(f"a request must end in {limit_s:g} seconds", "timeout"))
        return is_late

    def _schedule(self) -> None:
        """Send rows back and admit others."""
        served, scheduler = self._served, self._scheduler
        with self._wake:
            while len(served) > 1 and (
                scheduler.cached_tokens(served, added=1) > self.limits.cache_tokens
            ):
                # whoever has used most goes
                self._send_back(max(served, key=lambda r: (*scheduler.used(r.share), r.arrival)))
            while True:
                while (row := scheduler.admit(served)) is not None:
                    served.append(row)
                # These have had their turn, or have not begun it.
                movable = [row for row in served if row.length >= row.settled_length]
                victim = scheduler.victim(served, movable)
                if victim is None:
                    break
                self._send_back(victim)
        self._fit_prefixes()
        self._runner.bound_prepared(served)

    def _decode(self) -> None:
        rows = self._runner.rows
        if not rows:
            return
        record: Record | None = {} if any(row.request.tells_routing for row in rows) else None
        error = _attempt("rows could not be decoded", partial(self._runner.decode, record))
        if error is not None:
            self._recover(error)
            return
        with self._wake:
            for row in rows:
                self._scheduler.charge(row.share, 1)
        if record:
            _tell_routing(rows, record)

    def _read(self) -> None:
        """Read pieces of prompts, first of whoever was served least; rows then join the others."""
        budget = self.limits.prefill_tokens
        with self._wake:
            self._scheduler.give_credit(self._runner.rows, self._read_per_token)
        while budget > 0:
            piece, size = self._next_piece(budget)
            if piece is None:
                break
            if isinstance(piece, Routing):
                num_tokens = self._route(piece)
            else:
                num_others = len(self._runner.rows) or len(self._served) - 1
                num_tokens, error = self._read_piece(piece, size)
                if isinstance(error, torch.OutOfMemoryError) and num_others:
                    # it waits until others, whose memory it needs, have ended
                    self._put_back([piece], min(num_others, self._scheduler.max_rows))
                elif error is not None:
                    self._drop(piece, error)
            budget -= num_tokens
            with self._wake:
                self._scheduler.charge_reading(piece.share, num_tokens, self._runner.rows)

    def _next_piece(self, budget: int) -> tuple[Routing | Row | None, int]:
        """Choose the prompt that is read next, of whoever was served least, and for how far."""
        reading = [row for row in self._served if row not in self._runner.rows]
        with self._wake:
            pieces = [*self._routings, *reading]
            for piece in sorted(pieces, key=lambda piece: self._scheduler.used(piece.share)):
                credit = self._scheduler.readable(piece.share.tenant, self._runner.rows)
                size = min(budget, credit)
                if size >= min(MIN_PIECE, piece.num_left, self.limits.prefill_tokens):
                    return piece, size
        return None, 0

    def _route(self, routing: Routing) -> int:
        """Let a router choose by a prompt; return how many tokens of it were read."""
        with self._wake:
            self._routings.remove(routing)
        if not routing.choice.set_running_or_notify_cancel():
            return 0
        try:
            (choice,) = self.host.choose([routing.prompt_ids], [routing.adapter])
            routing.choice.set_result(choice)
        except Exception as error:
            routing.choice.set_exception(error.with_traceback(None))
        return min(len(routing.prompt_ids), MAX_PROMPT)

    def _read_piece(self, row: Row, size: int) -> tuple[int, Exception | None]:
        """Read a piece of a prompt, and let the row join the others after the last one."""
        before = row.num_read
        row.settled_length = row.length + 1  # until it has joined
        error = _attempt("a prompt could not be read", partial(self._runner.read, row, size))
        num_tokens = row.num_read - (before or row.num_known)
        if error is not None or row.num_left:
            return num_tokens, error
        if not row.new_ids:
            self.counts["prompt_tokens", row.owner] += row.length
            self.counts["prompt_tokens_cached", row.owner] += row.num_known
        turn = max(MIN_TURN, (row.length - row.num_known) // self._read_per_token)
        row.settled_length = row.length + turn
        error = _attempt("a row could not join the others", partial(self._runner.join, row))
        if error is not None:  # some layers' caches may be joined already: all are read again
            self._put_back(self._runner.take_apart(self._served))
        return num_tokens, error

    def _postprocess(self) -> None:
        """Choose a token for each row that is read, or send rows back if memory runs out."""
        rules = self._token_rules()
        asked = [row.request.num_logprobs for row in self._runner.rows]
        num_top = max((number for number in asked if number is not None), default=None)
        session = self._runner.session
        if session is not None:
            try:
                chosen = choose_tokens(session.logits, rules, num_top)
            except Exception as error:
                log_failure("tokens could not be chosen", error)
                self._recover(error.with_traceback(None))
            else:
                ended = []
                for row, logits, token in zip(
                    self._runner.rows, session.logits, chosen, strict=True
                ):
                    if not self._accept(row, logits, token):
                        ended.append(row)
                self._leave(ended)
        self._fit_prefixes()

    def _token_rules(self) -> list[TokenRule]:
        """Say how each row's token is chosen; a row whose grammar breaks ends alone."""
        rules = []
        for row in self._runner.rows:
            try:
                rules.append(row.token_rule(self.host.config.vocab_size))
            except Exception as error:
                log_failure("a token's rule could not be made", error)
                self._drop(row, error)
        return rules

    def _accept(self, row: Row, logits: Tensor, chosen: TokenLogProb) -> bool:
        """Add a row's next token; return whether the row goes on."""
        try:
            if chosen.token < 0:  # no logit is finite
                value = "NaN" if logits.isnan().any() else "infinity"
                raise not_finite("logits", value, [row.adapter_title])
            reason = row.take(chosen) if row.request.makes_tokens else row.end_after_prompt()
        except Exception as error:
            log_failure("a token could not be chosen", error)
            self._fail(row, error)
            return False
        if row.request.makes_tokens:
            self.counts["generated_tokens", row.owner] += 1
        if reason is None:
            return True
        self._runner.remember(row)
        self._end(row, reason)
        return False

    def _send_back(self, row: Row) -> None:
        self.counts["preemptions",] += 1
        if row in self._runner.rows:
            self._runner.remember(row)
        self._put_back([row])

    def _put_back(self, rows: Sequence[Row], max_rows: int | None = None) -> None:
        """Let rows wait again; after memory ran out, at most `max_rows` are served from now on."""
        self._leave(rows)
        if max_rows is not None:
            free_memory()
            self._scheduler.max_rows = max_rows
        with self._wake:
            # Each goes in front of the others, so that the first that arrived is the first again.
            for row in sorted(rows, key=lambda row: row.arrival, reverse=True):
                row.restart()
                self._scheduler.add(row, is_first=True)

    def _leave(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._served.remove(row)
        self._runner.leave(rows)

    def _drop(self, row: Row, error: Exception) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            error = too_large(f"a prompt of {len(row.request.prompt_ids)} tokens")
        self._leave([row])
        self._fail(row, error)

    def _recover(self, error: Exception) -> None:
        """After rows failed together, serve half as many at once if memory ran out, or end all."""
        rows = self._runner.take_apart(self._served)
        if not isinstance(error, torch.OutOfMemoryError) or len(self._served) == 1:
            for row in rows:
                self._drop(row, error)
            return
        self._put_back(rows, max(len(rows) // 2, 1))

    def _fail(self, row: Row, error: Exception) -> None:
        self._end(row, "error")
        if not row.is_cancelled:
            row.sink(error)

    def _end(self, row: Row, outcome: str) -> None:
        self.counts["requests", row.owner, outcome] += 1
        row.seconds = time.monotonic() - row.request.arrived_s
        self.on_end(row)
        # last, as the adapter may be removed with it
        row.on_gone()

    def _fit_prefixes(self) -> None:
        taken = self._scheduler.cached_tokens(self._served, added=1)
        self._runner.prefixes.shrink(self.limits.cache_tokens - taken)


def _attempt(failure: str, work: Callable[[], object]) -> Exception | None:
    # do something; return its error without the frames, which hold on to activations
    try:
        work()
    except Exception as error:
        log_failure(failure, error)
        return error.with_traceback(None)
    return None


def _tell_routing(rows: Sequence[Row], record: Record) -> None:
    for name, indices in rows_in_record([row.request.adapter for row in rows]).items():
        routed = [rows[index] for index in indices]
        routing = record.get(name)  # none of other adapters than mixtures
        if routing and any(row.request.tells_routing for row in routed):
            choices = choices_by_token(join_routing(routing))
            for row, choice in zip(routed, choices, strict=True):
                if row.request.tells_routing:
                    row.was_read(choice)
