"""Forward passes over L tokens: prompts are read alone, so that what a row says does not depend on
the rows beside it, and rows are decoded together.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterator, Sequence
from itertools import count, takewhile
from weakref import WeakKeyDictionary

import torch

from loraloom.adapters.contract import Adapter
from loraloom.base.structure import keeps_running_states
from loraloom.errors import not_finite
from loraloom.generation.request import Row, log_failure
from loraloom.generation.scheduler import EngineLimits
from loraloom.host.decoding import Decoding, TokenStates
from loraloom.host.forward import Record
from loraloom.host.host import Host
from loraloom.host.layout import RowAdapter, name_and_scale
from loraloom.host.prepared_weights import PreparedWeights
from loraloom.routing.record import choices_by_token

# Most adapters, each in each scale, whose weights are kept in compute form.
MAX_PREPARED = 32
# Tokens of a block.
BLOCK_TOKENS = 16


class PrefixCache:
    """Blocks of states, the least recently used of which go first."""

    # A block is found by its tokens, by all tokens before them and by a salt that says whose
    # weights computed the states, so that no adapter meets another's. It is used later than all
    # that go on from it, so that a block is never held without those before it.

    def __init__(self) -> None:
        self._blocks: OrderedDict[bytes, TokenStates] = OrderedDict()

    @property
    def num_tokens(self) -> int:
        return len(self._blocks) * BLOCK_TOKENS

    def find(self, salt: Hashable, tokens: Sequence[int]) -> TokenStates | None:
        """Return the known first tokens' states but the last's."""
        # The last is left out in any case: reading it gives the next one's logits.
        keys = [key for key, _ in _keys(salt, tokens[:-1])]
        held = list(takewhile(self._blocks.__contains__, keys))
        if not held:
            return None
        self._use(held)
        return TokenStates.join([self._blocks[key] for key in held])

    def remember(
        self, session: Decoding, index: int, salt: Hashable, tokens: Sequence[int]
    ) -> None:
        starts = dict(_keys(salt, tokens))
        missing = [key for key in starts if key not in self._blocks]
        if not missing:
            return
        states = session.states(index, starts[missing[0]], starts[missing[-1]] + BLOCK_TOKENS)
        blocks = states.split(BLOCK_TOKENS)
        # all or none, and at once in their order: memory may run out above
        self._blocks.update(zip(missing, blocks, strict=True))
        self._use([*starts])

    def shrink(self, max_tokens: int) -> None:
        while self._blocks and self.num_tokens > max_tokens:
            self._blocks.popitem(last=False)

    def _use(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):  # the first block is the last to go
            self._blocks.move_to_end(key)


def _keys(salt: Hashable, tokens: Sequence[int]) -> Iterator[tuple[bytes, int]]:
    read = hashlib.blake2b(repr(salt).encode(), digest_size=16)
    for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        block = [*tokens[start : start + BLOCK_TOKENS]]
        read.update(repr(block).encode())
        yield read.digest(), start


class Runner:
    """The rows that are decoded together, and what is kept of prompts and weights."""

    def __init__(self, host: Host, limits: EngineLimits):
        self.rows: list[Row] = []  # in the order of the session
        self.session: Decoding | None = None
        self.prefixes = PrefixCache()
        self._host = host
        # no token has a part of a running state
        self._keeps_prompts = limits.keeps_prompts and not keeps_running_states(host.config)
        self.prepared = PreparedWeights()
        self._prepared_for: set[RowAdapter] = set()
        # of each adapter a number, another one when its weights have changed, and their version
        self._serials: WeakKeyDictionary[Adapter, tuple[int, int]] = WeakKeyDictionary()
        self._next_serial = count()

    def read(self, row: Row, max_tokens: int) -> None:
        """Read some tokens of a row, after those that are known from prompts before."""
        if row.session is None:
            self._resume(row)
        piece = row.tokens[row.num_read : row.num_read + max_tokens]
        input_ids = torch.tensor([piece], device=self._host.device)
        # a row that was sent back is told what its last token met, which it wasn't yet
        record: Record | None = {} if row.new_ids and row.request.tells_routing else None
        if row.session is None:
            adapters = [row.request.adapter]
            row.session = self._host.prefill(input_ids, None, adapters, self.prepared, record)
        else:
            self._host.extend(row.session, input_ids, record)
        row.num_read += len(piece)
        if row.is_to_be_scored:
            self._score(row, row.num_read - len(piece))
        if record and row.num_left == 0:
            for routing in record.values():
                if routing:
                    row.was_read(choices_by_token(routing)[-1])

    def _resume(self, row: Row) -> None:
        row.salt = self._salt_of(row)
        if row.is_to_be_scored:  # by the states of all its tokens, and no others are kept
            return
        states = self.prefixes.find(row.salt, row.tokens)
        if states is not None:
            row.session = Decoding.resume(row.request.adapter, states, self.prepared)
            row.num_read = row.num_known = len(states.values)

    def _score(self, row: Row, start: int) -> None:
        assert row.session is not None
        prompt_ids = row.request.prompt_ids
        first = row.num_scored
        stop = min(row.num_read, len(prompt_ids) - 1)
        if stop <= first:  # it was scored before the row was sent back
            return
        states = row.session.hidden_states[0, first - start : stop - start]
        target_ids = prompt_ids[first + 1 : stop + 1]
        targets = torch.tensor(target_ids, device=states.device)
        adapters = [row.request.adapter] * len(targets)
        num_top = row.request.num_logprobs or 0
        scores = self._host.token_scores(states, targets, adapters, num_top)
        log_probs, _, top_log_probs, top_ids = [column.cpu() for column in scores]
        if not log_probs.isfinite().all():
            raise not_finite("log-probabilities", "NaN or infinite ones", [row.adapter_title])
        row.was_scored(log_probs, top_log_probs, top_ids)

    def join(self, row: Row) -> None:
        self.remember(row)
        session, row.session = row.session, None
        assert session is not None
        if self.session is None:
            self.session = session
        else:
            self.session.join(session)
        self.rows.append(row)

    def decode(self, record: Record | None) -> None:
        assert self.session is not None
        tokens = torch.tensor([row.new_ids[-1] for row in self.rows], device=self._host.device)
        self._host.decode(self.session, tokens, record)

    def leave(self, leaving: Collection[Row]) -> None:
        kept = [index for index, row in enumerate(self.rows) if row not in leaving]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in kept]
        if not kept:
            self.session = None
        elif self.session is not None:
            self.session.keep(kept)

    def remember(self, row: Row) -> None:
        session = row.session or self.session
        if not self._keeps_prompts or self._salt_of(row) != row.salt:  # weights have changed
            return
        assert session is not None
        index = 0 if row.session else self.rows.index(row)
        length = int(session.attention_mask[index].sum())
        tokens = row.tokens[:length]  # the last one may not be read yet
        try:
            self.prefixes.remember(session, index, row.salt, tokens)
        except Exception as error:  # of memory, say; the row does without it
            log_failure("a prompt could not be kept", error)

    def take_apart(self, served: Sequence[Row]) -> list[Row]:
        rows, self.rows, self.session = self.rows, [], None
        # what failed may have left weights half prepared
        self._prepare_anew(served, set())
        return rows

    def bound_prepared(self, served: Sequence[Row]) -> None:
        adapters = {row.request.adapter for row in served}
        self._prepared_for |= adapters
        if len(self._prepared_for) > max(MAX_PREPARED, len(adapters)):
            self._prepare_anew(served, adapters)

    def _prepare_anew(self, served: Sequence[Row], adapters: set[RowAdapter]) -> None:
        self._prepared_for, self.prepared = adapters, PreparedWeights()
        for session in (self.session, *(row.session for row in served)):
            if session is not None:
                session.prepared = self.prepared

    def _salt_of(self, row: Row) -> Hashable:
        """What tells those apart who may not use one another's prompts: customers, weights."""
        tenant = row.share.tenant
        name, scale = name_and_scale(row.request.adapter)
        if name is None:
            return tenant, None
        adapter = self._host.adapter(name)
        # an optimizer's step, or anything else that changes weights in place, counts them up
        version = sum(parameter._version for parameter in adapter.parameters())
        serial, last_version = self._serials.get(adapter, (None, None))
        if last_version != version:
            if serial is not None:
                self.prepared.forget(adapter)
            serial = next(self._next_serial)
            self._serials[adapter] = serial, version
        return tenant, serial, scale
