"""The engine: rows of the base model and of many adapters, continued together step by step.

Axes: B rows, L tokens, V vocabulary.

A step admits requests, reads a piece of their prompts, chooses a token for every row that is read,
lets rows go that have ended, and decodes the others. A prompt is read alone, so what a row says
does not depend on the rows beside it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import torch
from transformers import PreTrainedTokenizerBase

from loraloom.adapters.adapter import Adapter
from loraloom.errors import DataError
from loraloom.generation.cache import PrefixCache, Salts
from loraloom.generation.counts import EngineCounts, Outcome
from loraloom.generation.failures import log_failure
from loraloom.generation.halving import free_memory, too_large
from loraloom.generation.limits import (
    EngineLimits,
    NoRoutersError,
    NotFiniteError,
    OutOfTimeError,
    QueueFullError,
    StoppingError,
)
from loraloom.generation.prompts import check_token_ids
from loraloom.generation.sampling import end_tokens
from loraloom.generation.scheduler import Scheduler
from loraloom.generation.scores import score_texts
from loraloom.generation.scoring import tokens_per_batch
from loraloom.generation.sequence import (
    Failure,
    GenerationRequest,
    OnGone,
    Row,
    Score,
    ScoreRequest,
    Sink,
)
from loraloom.models.decoding import Decoding
from loraloom.models.families import keeps_running_states
from loraloom.models.forward import PreparedWeights, Record
from loraloom.models.host import Host
from loraloom.models.layout import RowAdapter, rows_in_record
from loraloom.routing.record import choices_by_token, join_routing

_log = logging.getLogger(__name__)

ROUTING_STEPS = 16
"""Of this many steps, one counts which experts tokens are sent to."""
MIN_TURN = 16
"""Tokens that a row generates at least before it gives way to others."""
READ_PER_TOKEN = 8
"""Tokens that are read in about the time in which one is generated."""
MAX_PREPARED = 32
"""Most adapters, each in each scale, whose weights are kept in compute form."""


@dataclass
class _Reading:
    """A row whose prompt is being read."""

    row: Row
    session: Decoding | None = None
    num_known: int = 0
    num_read: int = 0


class Engine:
    """Continues rows of many adapters together.

    `submit` and `cancel` may be called by any thread; one thread calls `step`.
    """

    def __init__(self, host: Host, tokenizer: PreTrainedTokenizerBase, limits: EngineLimits):
        self.host = host
        self.limits = limits
        self.counts = EngineCounts()
        self.on_end: Callable[[Row], object] = lambda row: None
        """Told of each row that has ended."""
        self.is_stopping = False
        self._tokenizer = tokenizer  # a fast one may be used by one thread at a time
        self._ends = end_tokens(host, tokenizer)
        self._lock = threading.RLock()
        self._wake = threading.Condition(self._lock)
        self._scheduler = Scheduler(limits.max_rows, limits.cache_tokens)
        self._arrivals = count(1)
        self._mean_s = 1.0
        self._scores: deque[Score] = deque()
        self._reading: list[_Reading] = []
        self._rows: list[Row] = []
        self._session: Decoding | None = None
        self._prefixes = PrefixCache()
        self._prepared = PreparedWeights()
        self._prepared_for: set[RowAdapter] = set()
        self._gone: list[Adapter] = []
        self._num_accepted = 0
        self._salts = Salts(host, self._forget_weights)

    @property
    def max_length(self) -> int:
        """Most tokens of a row, prompt and completion together."""
        return min(self.host.config.max_position_embeddings, self.limits.cache_tokens)

    @property
    def num_running(self) -> int:
        """Rows that are read or continued."""
        return len(self._reading) + len(self._rows)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do, and nothing promised."""
        return not self._has_work and self._num_accepted == 0

    @property
    def num_waiting(self) -> int:
        """Requests that wait, those whose adapters are being loaded too."""
        return len(self._scheduler) + len(self._scores) + self._num_accepted

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return self.num_running + self.num_waiting

    @property
    def cache_tokens_in_use(self) -> int:
        """Tokens of the cache that rows take up."""
        return self._scheduler.cached_tokens(self._served)

    @property
    def prefix_tokens(self) -> int:
        """Tokens of prompts that are kept for those that begin alike."""
        return self._prefixes.num_tokens

    @contextmanager
    def accepting(self) -> Iterator[None]:
        """Take a request whose adapter is still to be loaded: `stop` waits for its end."""
        with self._lock:
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
        """Ask for a completion."""
        self._check(request)
        row = Row(request, self._tokenizer, self._ends, self.host.device, sink, on_gone)
        with self._wake:
            self._check_open(is_accepted=is_accepted)
            row.arrival = next(self._arrivals)
            self._scheduler.add(row, self._served)
            self._wake.notify_all()
        return row

    def score(
        self,
        request: ScoreRequest,
        sink: Sink,
        on_gone: OnGone = lambda: None,
        *,
        is_accepted: bool = False,
    ) -> Score:
        """Ask for the log-probabilities of given tokens; other arguments and errors as `submit`."""
        self._check_adapter(request.adapter_name)
        room = self.host.config.max_position_embeddings
        if not 1 <= len(request.tokens) <= room:
            raise DataError(
                f"a text to be scored must have 1 to {room} tokens, got {len(request.tokens)}"
            )
        check_token_ids(request.tokens, self.host.config.vocab_size, "prompt")
        score = Score(request, sink, on_gone)
        with self._wake:
            self._check_open(is_accepted=is_accepted)
            self._scores.append(score)
            self._wake.notify_all()
        return score

    def cancel(self, row: Row | Score) -> None:
        """End a request, about which nothing more is told."""
        with self._wake:
            row.is_cancelled = True
            self._wake.notify_all()

    def forget(self, adapter: Adapter) -> None:
        """Let what was made of an adapter's weights go with it."""
        with self._wake:
            self._gone.append(adapter)
            self._wake.notify_all()

    def stop(self) -> None:
        """Take no more requests; `run` returns when those that are there have ended."""
        with self._wake:
            self.is_stopping = True
            self._wake.notify_all()

    def run(self) -> None:
        """Do steps while there is something to do, and wait for more, until `stop`."""
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
                self._fail_all(error)

    def step(self) -> bool:
        """Do one step; return whether there is more to do."""
        self.counts.num_steps += 1
        self._forget_gone()
        self._drop_ended()
        self._score()
        self._admit()
        self._read()
        self._choose()
        self._make_room()
        self._decode()
        return self._has_work

    @property
    def _served(self) -> list[Row]:
        return [*self._rows, *(reading.row for reading in self._reading)]

    @property
    def _has_work(self) -> bool:
        return bool(self._scheduler or self._scores or self._gone or self.num_running)

    def _check_open(self, *, is_accepted: bool = False) -> None:
        if self.is_stopping and not is_accepted:
            raise StoppingError("the server is stopping; ask another one, or later")
        num_sent_back = sum(row.settled_length > 0 for row in self._scheduler)
        if self.num_waiting - num_sent_back - is_accepted >= self.limits.max_waiting:
            raise QueueFullError(
                f"at most {self.limits.max_waiting} requests may wait, and so many do; "
                "try again later",
                math.ceil(
                    min(60.0, max(1.0, self._mean_s * self.num_waiting / self.limits.max_rows))
                ),
            )

    def _check_adapter(self, name: str | None) -> None:
        if name is not None:
            self.host.adapter(name)

    def _check_routes(self, request: GenerationRequest) -> None:
        name = request.adapter_name
        if name is None or not self.host.adapter(name).config.routes_outside_training:
            raise NoRoutersError(
                "routing is told of models whose routers read answers, "
                f"{request.owner!r} has none; leave routing out"
            )

    def _check(self, request: GenerationRequest) -> None:
        self._check_adapter(request.adapter_name)
        if request.tells_routing:
            self._check_routes(request)
        num_prompt, num_new = len(request.prompt_ids), request.sampling.max_new_tokens
        if num_prompt == 0:
            raise DataError("the prompt must not be empty")
        check_token_ids(request.prompt_ids, self.host.config.vocab_size, "prompt")
        if num_prompt + num_new > self.max_length:
            raise DataError(
                f"the prompt and max_tokens must have at most {self.max_length} tokens together, "
                f"got {num_prompt} and {num_new}; shorten the prompt or lower max_tokens"
            )

    def _forget_gone(self) -> None:
        with self._lock:
            gone, self._gone = self._gone, []
        for adapter in gone:
            self._forget_weights(adapter)

    def _forget_weights(self, adapter: Adapter) -> None:
        self._prepared.forget(adapter)

    def _drop_ended(self) -> None:
        """Let rows go whose clients have gone, or whose time is up."""
        with self._lock:
            for row in [row for row in self._scheduler if self._is_over(row)]:
                self._scheduler.remove(row)
        self._reading = [reading for reading in self._reading if not self._is_over(reading.row)]
        self._keep([place for place, row in enumerate(self._rows) if not self._is_over(row)])

    def _is_over(self, row: Row) -> bool:
        if row.is_cancelled:
            self._end(row, "cancelled")
            return True
        if self._is_late(row):
            self._fail(row, self._too_late())
            return True
        return False

    def _score(self) -> None:
        """Score some of the texts that wait, as many as fit into a forward."""
        room, batch = tokens_per_batch(self.host), []
        if self._served:  # whose next tokens wait meanwhile
            room = min(room, self.limits.prefill_tokens)
        with self._lock:
            over = [score for score in self._scores if score.is_cancelled or self._is_late(score)]
            for score in over:
                self._scores.remove(score)
            while self._scores and (not batch or len(self._scores[0].request.tokens) <= room):
                batch.append(self._scores.popleft())
                room -= len(batch[-1].request.tokens)
            for score in batch:
                self._scheduler.charge(score.share, len(score.request.tokens))
        for score in over:
            if not score.is_cancelled:
                score.sink(Failure(self._too_late()))
        score_texts(self.host, batch)
        for score in (*over, *batch):
            score.on_gone()

    def _is_late(self, row: Row | Score) -> bool:
        return time.monotonic() - row.request.arrived_s > self.limits.max_request_s

    def _too_late(self) -> OutOfTimeError:
        return OutOfTimeError(f"a request must end in {self.limits.max_request_s:g} seconds")

    def _admit(self) -> None:
        """Take rows in, and send others back for those that were served less."""
        with self._lock:
            while True:
                while (row := self._scheduler.admit(self._served)) is not None:
                    self._reading.append(_Reading(row))
                movable = [row for row in self._rows if row.length >= row.settled_length]
                movable += [reading.row for reading in self._reading if reading.session is None]
                victim = self._scheduler.victim(self._served, movable)
                if victim is None:
                    break
                self._send_back(victim)
        self._bound_prepared()
        self._fit_prefixes()

    def _bound_prepared(self) -> None:
        """Keep no more than `MAX_PREPARED` adapters and scales in compute form."""
        served = {row.request.adapter for row in self._served}
        self._prepared_for |= served
        if len(self._prepared_for) > max(MAX_PREPARED, len(served)):
            self._prepare_anew(served)

    def _read(self) -> None:
        """Read pieces of prompts, first of whoever was served least; rows then join the others."""
        budget = self.limits.prefill_tokens
        while self._reading and budget > 0:
            reading = min(self._reading, key=lambda one: self._scheduler.used(one.row.share))
            try:
                budget -= self._read_piece(reading, budget)
                error = None
            except Exception as raised:
                log_failure("a prompt could not be read", raised)
                error = raised.with_traceback(None)  # which holds on to activations
            if error is not None:
                self._reading.remove(reading)
                self._retry_or_fail(reading.row, error)
                continue
            if reading.num_read == reading.row.length:
                self._reading.remove(reading)
                try:
                    self._join(reading)
                except Exception as raised:  # sessions may be joined in some layers alone
                    log_failure("a row could not join the others", raised)
                    error = raised.with_traceback(None)
                if error is not None:
                    self._retry_or_fail(reading.row, error)
                    self._put_back(self._take_apart())

    def _read_piece(self, reading: _Reading, max_tokens: int) -> int:
        """Read some tokens of a row; return how many."""
        row, adapter = reading.row, reading.row.request.adapter
        tokens = row.tokens
        if reading.session is None:
            row.salt = self._salt_of(row)
            known = self._prefixes.find(row.salt, tokens)
            if known is not None:
                reading.session = Decoding.resume(adapter, known, self._prepared)
                reading.num_read = reading.num_known = known.shape[3]
        piece = tokens[reading.num_read : reading.num_read + max_tokens]
        input_ids = torch.tensor([piece], device=self.host.device)
        # a row that was sent back is told what its last token met, which it wasn't yet
        record: Record | None = {} if row.new_ids and row.request.tells_routing else None
        if reading.session is None:
            reading.session = self.host.prefill(input_ids, None, [adapter], self._prepared, record)
        else:
            self.host.extend(reading.session, input_ids, record)
        reading.num_read += len(piece)
        if record is not None and reading.num_read == row.length:
            (routing,) = record.values()
            row.was_read(choices_by_token(routing)[-1])
        if not row.new_ids:  # what is read again is nobody's wish
            self._scheduler.charge(row.share, len(piece))
        return len(piece)

    def _join(self, reading: _Reading) -> None:
        session, row = reading.session, reading.row
        assert session is not None
        if not row.new_ids:
            self.counts.prompt_tokens[row.owner] += row.length
            self.counts.cached_tokens[row.owner] += reading.num_known
        turn = max(MIN_TURN, (row.length - reading.num_known) // READ_PER_TOKEN)
        row.settled_length = row.length + turn
        self._remember(session, 0, row)
        if self._session is None:
            self._session = session
        else:
            self._session.join(session)
        self._rows.append(row)

    def _choose(self) -> None:
        """Choose every row's next token; rows that end with it go."""
        if self._session is None:
            return
        logits = self._session.logits
        most_likely = logits.argmax(-1).tolist()
        is_broken = logits.isnan().any(-1).tolist()
        staying = []
        for place, row in enumerate(self._rows):
            if is_broken[place]:
                error = f"model {row.owner!r} computes numbers that are not finite"
                self._fail(row, NotFiniteError(error))
            elif not self._choose_for(place, row, most_likely[place]):
                staying.append(place)
        self._keep(staying)

    def _choose_for(self, place: int, row: Row, most_likely: int) -> bool:
        """Choose a row's next token; return whether the row has ended."""
        assert self._session is not None
        logits = self._session.logits[place]
        try:
            reason = row.take(row.choose(logits, most_likely), logits)
        except Exception as error:
            log_failure("a token could not be chosen", error)
            self._fail(row, error)
            return True
        self.counts.generated_tokens[row.owner] += 1
        if reason is not None:
            self._remember(self._session, place, row)
            self._end(row, reason)
        return reason is not None

    def _make_room(self) -> None:
        """Send rows back to the queue while the cache would overflow."""
        while len(self._served) > 1 and (
            self._scheduler.cached_tokens(self._served, added=1) > self.limits.cache_tokens
        ):
            self._send_back(self._scheduler.greediest(self._served))
        self._fit_prefixes()

    def _send_back(self, row: Row) -> None:
        self.counts.num_preempted += 1
        if row in self._rows:
            assert self._session is not None
            self._remember(self._session, self._rows.index(row), row)
            self._keep([place for place, other in enumerate(self._rows) if other is not row])
        else:
            self._reading = [reading for reading in self._reading if reading.row is not row]
        with self._lock:
            self._scheduler.put_back(row)

    def _decode(self) -> None:
        if self._session is None:
            return
        tokens = torch.tensor([row.new_ids[-1] for row in self._rows], device=self.host.device)
        is_counted = self.counts.num_steps % ROUTING_STEPS == 0
        is_told = any(row.request.tells_routing for row in self._rows)
        record: Record | None = {} if is_counted or is_told else None
        error = None
        try:
            self.host.decode(self._session, tokens, record)
        except Exception as raised:
            log_failure("rows could not be decoded", raised)
            error = raised.with_traceback(None)
        if error is not None:
            self._recover(error)
            return
        self._scheduler.clear(self._rows)
        for row in self._rows:
            self._scheduler.charge(row.share, 1)
        if record and is_counted:
            owners = {row.request.adapter_name: row.owner for row in self._rows}
            for name, routing in record.items():
                self.counts.add_routing(owners[name], routing)
        if record and is_told:
            self._tell_routing(record)

    def _tell_routing(self, record: Record) -> None:
        """Let rows that ask for it know what their adapters' routers did with their last tokens."""
        for name, places in rows_in_record([row.request.adapter for row in self._rows]).items():
            rows = [self._rows[place] for place in places]
            if not any(row.request.tells_routing for row in rows):
                continue
            choices = choices_by_token(join_routing(record[name]))
            for row, choice in zip(rows, choices, strict=True):
                if row.request.tells_routing:
                    row.was_read(choice)

    def _recover(self, error: Exception) -> None:
        """After rows failed together, read them again, adapter by adapter.

        Rows of one adapter that failed without others have failed for good. Where memory ran out,
        half as many are read.
        """
        rows = self._take_apart()
        if isinstance(error, torch.OutOfMemoryError) and len(rows) > 1:
            free_memory()
            self._scheduler.max_rows = len(rows) // 2
            self._put_back(rows)
            return
        if len({row.request.adapter_name for row in rows}) == 1:
            for row in rows:
                self._fail(row, error)
            return
        with self._lock:
            self._scheduler.suspect(rows)
        self._put_back(rows)

    def _retry_or_fail(self, row: Row, error: Exception) -> None:
        """Let a row wait until others have ended if it needs their memory."""
        if not isinstance(error, torch.OutOfMemoryError):
            self._fail(row, error)
        elif self._rows:
            free_memory()
            self._scheduler.max_rows = len(self._rows)
            self._put_back([row])
        else:
            self._fail(row, too_large(f"a prompt of {len(row.request.prompt_ids)} tokens"))

    def _take_apart(self) -> list[Row]:
        """End the session of the rows that are continued, with the weights that were prepared."""
        rows, self._rows, self._session = self._rows, [], None
        self._prepare_anew(set())
        return rows

    def _put_back(self, rows: Sequence[Row]) -> None:
        with self._lock:
            for row in sorted(rows, key=lambda row: -row.arrival):
                self._scheduler.put_back(row)

    def _prepare_anew(self, served: set[RowAdapter]) -> None:
        self._prepared_for = served
        self._prepared = PreparedWeights()
        for session in (self._session, *(reading.session for reading in self._reading)):
            if session is not None:
                session.prepared = self._prepared

    def _keep(self, places: list[int]) -> None:
        """Let all rows but these go; the last ones take the places that become free."""
        if len(places) == len(self._rows):
            return
        staying, last = set(places), [place for place in places if place >= len(places)]
        places = [place if place in staying else last.pop() for place in range(len(places))]
        self._rows = [self._rows[place] for place in places]
        if not places:
            self._session = None
        elif self._session is not None:
            self._session.keep(places)

    def _fail(self, row: Row, error: Exception) -> None:
        self._end(row, "error")
        if not row.is_cancelled:
            row.sink(Failure(error))

    def _end(self, row: Row, outcome: Outcome) -> None:
        self.counts.requests[row.owner, outcome] += 1
        row.seconds = time.monotonic() - row.request.arrived_s
        self._mean_s += 0.1 * (row.seconds - self._mean_s)
        self.on_end(row)
        row.on_gone()

    def _fail_all(self, error: Exception) -> None:
        served, self._rows, self._reading, self._session = self._served, [], [], None
        for row in served:
            self._fail(row, error)

    def _salt_of(self, row: Row) -> Hashable:
        """What tells those apart who may not use one another's prompts."""
        tenant = row.share.tenant if self.limits.prompt_cache == "own" else None
        return tenant, self._salts.of(row.request.adapter)

    def _remember(self, session: Decoding, place: int, row: Row) -> None:
        """Keep the states of a row's whole blocks for prompts that begin alike."""
        if self.limits.prompt_cache == "off" or keeps_running_states(self.host.config):
            return  # no token has a part of a running state
        if self._salt_of(row) != row.salt:  # weights have changed
            return
        tokens = row.tokens[: int(session.lengths[place])]  # the last one may not be read yet
        try:
            self._prefixes.remember(session, place, row.salt, tokens)
        except Exception as error:  # of memory, say; the row does without it
            log_failure("a prompt could not be kept", error)

    def _fit_prefixes(self) -> None:
        """Let remembered prompts go where rows need their memory."""
        taken = self._scheduler.cached_tokens(self._served, added=1)
        self._prefixes.shrink(self.limits.cache_tokens - taken)
