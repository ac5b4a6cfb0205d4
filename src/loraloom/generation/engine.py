"""The engine: rows of the base model and of many adapters, continued together step by step.

Axes: B rows, L tokens, V vocabulary.

A step schedules rows (some are sent back, others admitted), decodes those that are under way and
reads pieces of the prompts of others, and then chooses a token for every row that is read.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraloom.adapters.method import Adapter
from loraloom.errors import DataError
from loraloom.generation.prompts import check_token_ids
from loraloom.generation.rows import text_row
from loraloom.generation.runner import Runner
from loraloom.generation.sampling import end_tokens
from loraloom.generation.scheduler import EngineLimits, Scheduler
from loraloom.generation.scoring import free_memory, score_rows, tokens_per_batch, too_large
from loraloom.generation.sequence import (
    Failure,
    GenerationRequest,
    NotFiniteError,
    OnGone,
    RequestError,
    Row,
    Sink,
    log_failure,
)
from loraloom.models.forward import Record
from loraloom.models.host import Host
from loraloom.models.layout import rows_in_record
from loraloom.routing.record import (
    LayerRouting,
    choices_by_token,
    describe_router,
    join_routing,
)
from loraloom.routing.tally import expert_loads

_log = logging.getLogger(__name__)

# Of this many steps, one counts which experts tokens are sent to.
ROUTING_STEPS = 16
# Tokens that a row generates at least before it gives way to others.
MIN_TURN = 16
# Tokens that are read in about the time in which one is generated.
READ_PER_TOKEN = 8

Failed = tuple[Row, Exception]


class Engine:
    """Continues rows of many adapters together.

    Any thread may `submit` rows, and set their `is_cancelled`; one thread calls `step`.
    """

    def __init__(self, host: Host, tokenizer: PreTrainedTokenizerBase, limits: EngineLimits):
        self.host = host
        self.limits = limits
        self.counts: Counter[tuple[str, ...]] = Counter()
        """What only grows, by a metric's name and labels."""
        self.on_end: Callable[[Row], object] = lambda row: None
        self.is_stopping = False
        self._tokenizer = tokenizer  # a fast one may be used by one thread at a time
        self._ends = end_tokens(host, tokenizer)
        self._wake = threading.Condition()  # with a lock that its holder may take again
        self._scheduler = Scheduler(limits.max_rows, limits.cache_tokens)
        self._arrivals = count(1)
        self._mean_s = 1.0
        self._to_score: deque[Row] = deque()
        self._served: list[Row] = []  # in the order in which they were admitted
        self._runner = Runner(host, limits.prompt_cache)
        self._gone: list[Adapter] = []
        self._num_accepted = 0

    @property
    def max_length(self) -> int:
        return min(self.host.config.max_position_embeddings, self.limits.cache_tokens)

    @property
    def num_running(self) -> int:
        return len(self._served)

    @property
    def num_waiting(self) -> int:  # those whose adapters are being loaded too
        return len(self._scheduler) + len(self._to_score) + self._num_accepted

    @property
    def is_idle(self) -> bool:
        return not self._has_work and self._num_accepted == 0

    @property
    def _has_work(self) -> bool:
        return bool(self._scheduler or self._to_score or self._gone or self._served)

    @property
    def cache_tokens_in_use(self) -> int:
        return self._scheduler.cached_tokens(self._served)

    @property
    def prefix_tokens(self) -> int:
        return self._runner.prefixes.num_tokens

    @contextmanager
    def accepting(self) -> Iterator[None]:
        """Take a request whose adapter is still to be loaded: `stop` waits for its end."""
        with self._wake:
            self._check_open()
            self._num_accepted += 1
        try:
            yield
        finally:
            with self._wake:
                self._num_accepted -= 1
                self._wake.notify_all()

    def submit(
        self,
        request: GenerationRequest,
        sink: Sink,
        on_gone: OnGone = lambda: None,
        *,
        is_accepted: bool = False,
    ) -> Row:
        self._check(request)
        row = Row(request, self._tokenizer, self._ends, self.host.device, sink, on_gone)
        with self._wake:
            self._check_open(is_accepted=is_accepted)
            row.arrival = next(self._arrivals)
            if request.scores_prompt:
                self._to_score.append(row)
            else:
                self._scheduler.add(row, self._served)
            self._wake.notify_all()
        return row

    def forget(self, adapter: Adapter) -> None:
        with self._wake:
            self._gone.append(adapter)
            self._wake.notify_all()

    def stop(self) -> None:
        """Take no more requests; `run` returns when those that are there have ended."""
        with self._wake:
            self.is_stopping = True
            self._wake.notify_all()

    def run(self) -> None:
        while True:
            with self._wake:
                while not self._has_work and not (self.is_stopping and self.is_idle):
                    self._wake.wait()
                if not self._has_work:
                    return
            try:
                self.step()
            except Exception as error:
                _log.exception("a step failed")
                served, self._served = self._served, []
                self._runner.take_apart(served)
                for row in served:
                    self._fail(row, error)

    def step(self) -> bool:
        self.counts["steps",] += 1
        self._drop_ended()
        self._score_prompts()
        reading = self._schedule()
        failures = [*self._decode(), *self._read(reading)]
        self._postprocess(failures)
        return self._has_work

    def _check_open(self, *, is_accepted: bool = False) -> None:
        if self.is_stopping and not is_accepted:
            raise RequestError(
                "the server is stopping; ask another one, or later", "stopping", retry_after_s=1
            )
        num_waiting = self.num_waiting - is_accepted
        if num_waiting >= self.limits.max_waiting:
            num_waiting -= sum(row.settled_length > 0 for row in self._scheduler)  # were served
        if num_waiting >= self.limits.max_waiting:
            seconds = self._mean_s * self.num_waiting / self.limits.max_rows
            raise RequestError(
                f"at most {self.limits.max_waiting} requests may wait, and so many do; "
                "try again later",
                "queue_full",
                retry_after_s=math.ceil(min(60.0, max(1.0, seconds))),
            )

    def _check(self, request: GenerationRequest) -> None:
        name = request.adapter_name
        adapter = None if name is None else self.host.adapter(name)
        if request.tells_routing and (adapter is None or not adapter.config.experts_per_router):
            raise RequestError(
                "routing is told of models whose routers read answers, "
                f"{request.owner!r} has none; leave routing out",
                "no_routers",
                param="routing",
            )
        num_prompt = len(request.prompt_ids)
        num_new = 0 if request.scores_prompt else request.sampling.max_new_tokens
        if num_prompt == 0:
            raise DataError("the prompt must not be empty")
        check_token_ids(request.prompt_ids, self.host.config.vocab_size, "prompt")
        check_token_ids([*request.logit_bias], self.host.config.vocab_size, "logit_bias")
        if num_prompt + num_new > self.max_length:
            raise RequestError(
                f"the prompt and max_tokens must have at most {self.max_length} tokens together, "
                f"got {num_prompt} and {num_new}; shorten the prompt or lower max_tokens",
                "context_length_exceeded",
            )

    def _drop_ended(self) -> None:
        with self._wake:
            gone, self._gone = self._gone, []
            for row in [row for row in self._scheduler if self._is_over(row)]:
                self._scheduler.remove(row)
            for row in [row for row in self._to_score if self._is_over(row)]:
                self._to_score.remove(row)
        # here, as no forward uses what was prepared of them between two steps
        for adapter in gone:
            self._runner.forget(adapter)
        self._leave([row for row in self._served if self._is_over(row)])

    def _is_over(self, row: Row) -> bool:
        limit_s = self.limits.max_request_s
        if row.is_cancelled:
            self._end(row, "cancelled")
        elif time.monotonic() - row.request.arrived_s > limit_s:
            late = RequestError(f"a request must end in {limit_s:g} seconds", "timeout")
            self._fail(row, late)
        else:
            return False
        return True

    def _score_prompts(self) -> None:
        """Score prompts that wait for one adapter, as many as fit into a forward."""
        room, rows = tokens_per_batch(self.host), []
        if self._served:  # whose next tokens wait meanwhile
            room = min(room, self.limits.prefill_tokens)
        with self._wake:
            waiting = self._to_score
            while waiting and (not rows or waiting[0].length <= room):
                if rows and waiting[0].request.adapter != rows[0].request.adapter:
                    break  # a fault is an adapter's own
                rows.append(waiting.popleft())
                room -= rows[-1].length
                self._scheduler.charge(rows[-1].share, rows[-1].length)
        if not rows:
            return
        requests = [(row.request.adapter, text_row(row.request.prompt_ids)) for row in rows]
        num_top = max(row.request.num_logprobs or 0 for row in rows)
        try:
            scores = score_rows(self.host, requests, num_top=num_top)
        except Exception as error:
            log_failure("prompts could not be scored", error)
            for row in rows:
                self._fail(row, error)
            return
        for row, scored in zip(rows, scores, strict=True):
            row.was_scored(scored)
            self._end(row, "length")

    def _schedule(self) -> list[Row]:
        """Send rows back and admit others; return those that are to be read."""
        served, scheduler, running = self._served, self._scheduler, set(self._runner.rows)
        with self._wake:
            while len(served) > 1 and (
                scheduler.cached_tokens(served, added=1) > self.limits.cache_tokens
            ):
                # whoever has used most goes
                self._send_back(max(served, key=lambda r: (*scheduler.used(r.share), r.arrival)))
            while True:
                while (row := scheduler.admit(served)) is not None:
                    served.append(row)
                # those that have made enough of their turn, or not begun
                movable = [
                    row
                    for row in served
                    if (
                        row.length >= row.settled_length
                        if row in self._runner.rows
                        else not row.num_read
                    )
                ]
                victim = scheduler.victim(served, movable)
                if victim is None:
                    break
                self._send_back(victim)
        self._fit_prefixes()
        self._runner.bound_prepared(served)
        return [row for row in served if row not in running]

    def _decode(self) -> list[Failed]:
        rows = self._runner.rows
        if not rows:
            return []
        is_counted = self.counts["steps",] % ROUTING_STEPS == 0
        is_told = any(row.request.tells_routing for row in rows)
        record: Record | None = {} if is_counted or is_told else None
        error = _attempt("rows could not be decoded", partial(self._runner.decode, record))
        if error is not None:
            return self._recover(error)
        # they went well together, so none of them is suspected any more
        self._scheduler.clear(rows)
        for row in rows:
            self._scheduler.charge(row.share, 1)
        if record and is_counted:
            owners = {row.request.adapter_name: row.owner for row in rows}
            for name, routing in record.items():
                self._count_routing(owners[name], routing)
        if record and is_told:
            _tell_routing(rows, record)
        return []

    def _read(self, reading: list[Row]) -> list[Failed]:
        """Read pieces of prompts, first of whoever was served least; rows then join the others."""
        failures = []
        budget = self.limits.prefill_tokens
        while reading and budget > 0:
            row = min(reading, key=lambda row: self._scheduler.used(row.share))
            before = row.num_read
            error = _attempt("a prompt could not be read", partial(self._runner.read, row, budget))
            num_tokens = row.num_read - (before or row.num_known)
            budget -= num_tokens
            if not row.new_ids:  # what is read again is nobody's wish
                self._scheduler.charge(row.share, num_tokens)
            if error is None and row.num_read == row.length:
                reading.remove(row)
                if not row.new_ids:
                    self.counts["prompt_tokens", row.owner] += row.length
                    self.counts["prompt_tokens_cached", row.owner] += row.num_known
                turn = max(MIN_TURN, (row.length - row.num_known) // READ_PER_TOKEN)
                row.settled_length = row.length + turn
                error = _attempt("a row could not join the others", partial(self._runner.join, row))
                if error is not None:  # sessions may be joined in some layers alone
                    self._put_back(self._runner.take_apart(self._served))
            elif error is not None:
                reading.remove(row)
            if error is not None:
                failures.append((row, error))
        return failures

    def _count_routing(self, model: str, routing: Sequence[LayerRouting]) -> None:
        # those that mix all experts send tokens nowhere
        chosen = [one for one in routing if one.selected_experts.shape[-1] < one.num_experts]
        loads = expert_loads(chosen).long().tolist() if chosen else []
        for record, row in zip(chosen, loads, strict=True):
            router = describe_router(record.router)
            for expert, number in enumerate(row[: record.num_experts]):
                self.counts["expert_tokens", model, router, str(expert)] += number

    def _postprocess(self, failures: Sequence[Failed]) -> None:
        for row, error in failures:
            self._retry_or_fail(row, error)
        if self._runner.session is not None:
            logits = self._runner.session.logits  # (B, V)
            # read from the device once for all rows, not once for each
            most_likely = logits.argmax(-1).tolist()
            is_broken = logits.isnan().any(-1).tolist()
            columns = zip(logits, most_likely, is_broken, strict=True)
            rows = zip(self._runner.rows, columns, strict=True)
            self._leave([row for row, column in rows if self._ends_now(row, *column)])
        self._fit_prefixes()

    def _ends_now(self, row: Row, logits: Tensor, most_likely: int, is_broken: bool) -> bool:
        if is_broken:
            error = f"model {row.owner!r} computes numbers that are not finite"
            self._fail(row, NotFiniteError(error))
            return True
        try:
            reason = row.take(row.choose(logits, most_likely), logits)
        except Exception as error:
            log_failure("a token could not be chosen", error)
            self._fail(row, error)
            return True
        self.counts["generated_tokens", row.owner] += 1
        if reason is not None:
            self._runner.remember(row)
            self._end(row, reason)
        return reason is not None

    def _send_back(self, row: Row) -> None:
        self.counts["preemptions",] += 1
        if row in self._runner.rows:
            self._runner.remember(row)
        self._put_back([row])

    def _put_back(self, rows: Sequence[Row]) -> None:
        self._leave(rows)
        with self._wake:
            for row in sorted(rows, key=lambda row: -row.arrival):
                row.session, row.num_read, row.num_known = None, 0, 0
                self._scheduler.put_back(row)

    def _leave(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._served.remove(row)
        self._runner.leave(rows)

    def _recover(self, error: Exception) -> list[Failed]:
        """After rows failed together, read them again, adapter by adapter.

        Rows of one adapter that failed without others have failed for good. Where memory ran out,
        half as many are read.
        """
        rows = self._runner.take_apart(self._served)
        if isinstance(error, torch.OutOfMemoryError) and len(rows) > 1:
            free_memory()
            self._scheduler.max_rows = len(rows) // 2
        elif len({row.request.adapter_name for row in rows}) == 1:
            return [(row, error) for row in rows]
        else:
            with self._wake:
                self._scheduler.suspect(rows)
        self._put_back(rows)
        return []

    def _retry_or_fail(self, row: Row, error: Exception) -> None:
        """Let a row wait until others have ended if it needs their memory."""
        is_memory = isinstance(error, torch.OutOfMemoryError)
        if is_memory and self._runner.rows:
            free_memory()
            self._scheduler.max_rows = len(self._runner.rows)
            self._put_back([row])
            return
        if is_memory:
            error = too_large(f"a prompt of {len(row.request.prompt_ids)} tokens")
        self._leave([row])
        self._fail(row, error)

    def _fail(self, row: Row, error: Exception) -> None:
        self._end(row, "error")
        if not row.is_cancelled:
            row.sink(Failure(error))

    def _end(self, row: Row, outcome: str) -> None:
        self.counts["requests", row.owner, outcome] += 1
        row.seconds = time.monotonic() - row.request.arrived_s
        self._mean_s += 0.1 * (row.seconds - self._mean_s)
        self.on_end(row)
        # last, as the adapter may be removed with it
        row.on_gone()

    def _fit_prefixes(self) -> None:
        taken = self._scheduler.cached_tokens(self._served, added=1)
        self._runner.prefixes.shrink(self.limits.cache_tokens - taken)


def _attempt(what: str, work: Callable[[], object]) -> Exception | None:
    # do something; return its error without the frames, which hold on to activations
    try:
        work()
    except Exception as error:
        log_failure(what, error)
        return error.with_traceback(None)
    return None


def _tell_routing(rows: Sequence[Row], record: Record) -> None:
    for name, places in rows_in_record([row.request.adapter for row in rows]).items():
        of_adapter = [rows[place] for place in places]
        if any(row.request.tells_routing for row in of_adapter):
            choices = choices_by_token(join_routing(record[name]))
            for row, choice in zip(of_adapter, choices, strict=True):
                if row.request.tells_routing:
                    row.was_read(choice)
