"""What the pool looks like after a step, as pure data: the one place here that knows the engine.

    snapshot(engine, groups) -> Snapshot        tables, tokens, cached blocks, counters
    measure(snapshot) -> Measures               used, shared, cached, free; written, reserved, empty slots

Everything else in this room (recorder, terminal, HTML) reads snapshots only.
"""

import dataclasses
import enum
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from jpaged.memory import BlockManager, Table
from jpaged.scheduling import Scheduler
from jpaged.scheduling.batch import Batch
from jpaged.scheduling.beam_search import path
from jpaged.sequence import NO_ROW, SequenceGroup
from jpaged.sequence import Status as GroupStatus


class Observable(Protocol):
    """What is observed: `LLMEngine`, or anything that steps a scheduler over a block manager."""

    blocks: BlockManager
    scheduler: Scheduler

    def step(self) -> Any: ...


class Status(enum.StrEnum):
    """Of a request. The values stand in recordings."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    """It waits again, and its keys and values will be computed anew."""
    SWAPPED = "swapped"
    """Its blocks are in host memory."""
    FINISHED = "finished"
    PARKED = "parked"
    """No request: block tables that are kept without a row."""


PARKED = -1
"""The number under which parked tables stand in the list of requests."""


class PoolShape(NamedTuple):
    num_blocks: int
    """The null block (block 0) included."""
    block_size: int
    """Tokens a block."""
    host_blocks: int = 0
    """Blocks that host memory has room for."""
    layer_groups: int = 1
    """Blocks that hold some tokens, one for each group of layers."""


@dataclasses.dataclass(frozen=True, slots=True)
class SequenceState:
    """A sequence of a request that is looked at."""

    request: int
    """`RequestState.number`."""
    index: int
    """Which sample of its request, or beam; of a parked table, any number of its own."""
    tokens: Sequence[int]
    """The prompt and what has been generated and read back: a tuple; or, if which tokens they are shall not be told, a
    range, as long as they are many."""
    blocks: tuple[int, ...]
    """Its block table: of each logical block, a physical one for each group of layers; 0 where the window has left it.
    Empty while it waits."""
    written: int
    """Tokens whose K and V are in the pool, those of steps that are launched included."""
    placed: int
    """Tokens that have a slot: written, or reserved for a chunk of the prompt that is not computed yet."""


@dataclasses.dataclass(frozen=True, slots=True)
class RequestState:
    number: int
    """Unique in an engine's life, by arrival; ids of requests may be used again."""
    request_id: str
    status: Status
    finish_reason: str
    """Of its first sequence; "" until it has finished."""
    prompt_tokens: int
    cached_tokens: int
    """Tokens of the prompt that were found in the prefix cache."""
    preemptions: int
    host_blocks: int = 0
    """Its blocks in host memory."""
    arrived: int = 0
    """Milliseconds on the clock of `RequestMetrics`."""
    waited: int = -1
    """Milliseconds from its arrival until it was first scheduled; -1: it has not been."""


@dataclasses.dataclass(frozen=True, slots=True)
class Counters:
    """Totals since the engine began."""

    cache_queries: int = 0
    """Tokens looked up in the prefix cache."""
    cache_hits: int = 0
    """Tokens found there."""
    preemptions: int = 0
    tokens_lost: int = 0
    """Computed tokens that preemptions by recompute threw away."""
    copies: int = 0
    """Blocks copied on write."""
    swaps_out: int = 0
    """Groups moved to host memory."""
    swaps_in: int = 0
    """Groups moved back."""


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    pool: PoolShape
    requests: tuple[RequestState, ...]
    """Of the groups that were asked for, those that have just finished included."""
    sequences: tuple[SequenceState, ...]
    """Theirs; finished ones hold no blocks."""
    cached: frozenset[int]
    """Blocks that nobody refers to and whose content may be found again."""
    counters: Counters = Counters()

    def references(self) -> Counter[int]:
        """Block -> table entries that point to it; one reference each."""
        return Counter(block for sequence in self.sequences for block in sequence.blocks if block)


@dataclasses.dataclass(frozen=True, slots=True)
class Measures:
    """Of one snapshot. used + cached + free = all blocks but the null block."""

    used: int
    """Blocks that some table refers to."""
    shared: int
    """Of those, blocks with more than one reference."""
    cached: int
    free: int
    entries: int
    """Table entries: the blocks that it would take without sharing."""
    written: int
    """Slots of used blocks that hold K and V, a shared one counted once."""
    reserved: int
    """Slots of used blocks that a known token will fill."""
    empty: int
    """The other slots of used blocks: the paper's internal fragmentation."""
    host: int
    """Blocks in host memory."""
    running: int
    waiting: int
    """Requests, the preempted ones included."""
    swapped: int


def live_groups(engine: Observable) -> list[SequenceGroup]:
    """The groups that the engine has not finished, by arrival."""
    roster = engine.scheduler.roster
    return sorted([*roster.running, *roster.swapped, *roster.waiting], key=lambda group: group.order[1])


def snapshot(engine: Observable, groups: Iterable[SequenceGroup], *, with_tokens: bool = True) -> Snapshot:
    """What the pool holds now.

    Args:
      engine: between two steps.
      groups: all that it has not finished (`live_groups`), and any that have finished since one last looked.
      with_tokens: say which tokens they have, and not only how many.
    """
    blocks, scheduler = engine.blocks, engine.scheduler
    swapped = scheduler.roster.swapped
    requests, sequences = [], []
    for group in groups:
        requests.append(_request(group, len(swapped[group][0].blocks) if group in swapped else 0))
        sequences += _sequences(group, blocks, scheduler.batch, with_tokens)
    if blocks.parked:
        requests.insert(0, RequestState(PARKED, "parked", Status.PARKED, "", 0, 0, 0))
        sequences[:0] = sorted(map(_parked, blocks.parked), key=lambda state: state.index)
    return Snapshot(
        PoolShape(blocks.allocator.num_blocks, blocks.block_size, scheduler.swap_space.capacity, blocks.num_groups),
        tuple(requests),
        tuple(sequences),
        frozenset(blocks.allocator.cached_blocks()),
        Counters(
            cache_queries=blocks.stats.queries,
            cache_hits=blocks.stats.hits,
            preemptions=scheduler.num_preemptions,
            tokens_lost=scheduler.tokens_lost,
            copies=blocks.num_copies,
            swaps_out=scheduler.num_swaps_out,
            swaps_in=scheduler.num_swaps_in,
        ),
    )


def _sequences(group: SequenceGroup, blocks: BlockManager, batch: Batch, with_tokens: bool) -> list[SequenceState]:
    states = []
    for rank, sequence in enumerate(group.sequences):
        known, row = sequence.tokens, sequence.row
        if row != NO_ROW and blocks.counts[row] and group.beams is not None:
            known = [*group.prompt_token_ids, *(node.token for node in path(group.beams.nodes[rank]))]
        tokens = tuple(known) if with_tokens else range(len(known))
        if row == NO_ROW or not blocks.counts[row]:
            states.append(SequenceState(group.order[1], sequence.index, tokens, (), 0, 0))
            continue
        table = tuple(blocks.tables[row, : blocks.counts[row]].tolist())
        written = int(batch.position[row])
        placed = max(written, int(batch.target[row]))
        states.append(SequenceState(group.order[1], sequence.index, tokens, table, written, placed))
    return sorted(states, key=lambda state: state.index)


def _parked(table: Table) -> SequenceState:
    # A number that stays the table's own while others come and go; which one means nothing.
    return SequenceState(PARKED, id(table), (), tuple(table.blocks.tolist()), table.num_computed, table.num_computed)


def _request(group: SequenceGroup, host_blocks: int) -> RequestState:
    preempted = group.metrics.num_preemptions > 0
    status = {
        GroupStatus.WAITING: Status.PREEMPTED if preempted else Status.WAITING,
        GroupStatus.RUNNING: Status.RUNNING,
        GroupStatus.SWAPPED: Status.SWAPPED,
        GroupStatus.FINISHED: Status.FINISHED,
    }[group.status]
    times = group.metrics
    first = times.first_scheduled_time
    reason = group.sequences[0].finish_reason if status is Status.FINISHED else None
    return RequestState(
        number=group.order[1],
        request_id=group.request_id,
        status=status,
        finish_reason=reason or "",
        prompt_tokens=len(group.prompt_token_ids),
        cached_tokens=group.num_cached_tokens,
        preemptions=group.metrics.num_preemptions,
        host_blocks=host_blocks,
        arrived=int(1000 * times.arrival_time),
        waited=-1 if first is None else int(1000 * (first - times.arrival_time)),
    )


def measure(snapshot: Snapshot) -> Measures:
    """Counts blocks by state, and the slots of used blocks by what is in them."""
    num_blocks, size = snapshot.pool.num_blocks, snapshot.pool.block_size
    references = np.zeros(num_blocks, np.int64)
    written = np.zeros(num_blocks, np.int64)  # filled slots of each block: of sharers, the furthest counts
    placed = np.zeros(num_blocks, np.int64)
    for sequence in snapshot.sequences:
        table = np.array(sequence.blocks, np.int64)
        start = np.arange(len(table)) // snapshot.pool.layer_groups * size
        np.add.at(references, table, 1)
        np.maximum.at(written, table, np.clip(sequence.written - start, 0, size))
        np.maximum.at(placed, table, np.clip(sequence.placed - start, 0, size))
    references[0] = written[0] = placed[0] = 0  # the null block
    used, statuses = int((references > 0).sum()), Counter(request.status for request in snapshot.requests)
    return Measures(
        used=used,
        shared=int((references > 1).sum()),
        cached=len(snapshot.cached),
        free=num_blocks - 1 - used - len(snapshot.cached),
        entries=int(references.sum()),
        written=int(written.sum()),
        reserved=int(placed.sum() - written.sum()),
        empty=int(used * size - placed.sum()),
        host=sum(request.host_blocks for request in snapshot.requests),
        running=statuses[Status.RUNNING],
        waiting=statuses[Status.WAITING] + statuses[Status.PREEMPTED],
        swapped=statuses[Status.SWAPPED],
    )
