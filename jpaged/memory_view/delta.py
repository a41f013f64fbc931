"""Snapshots as differences, small enough that thousands of steps make a page that can be mailed.

    difference(before, after) -> Frame          plain JSON; only what changed
    apply(before, frame) -> after               its exact inverse; page/pool.js does the same in JavaScript

A frame has these keys, and leaves out those that would be empty. A sequence is named by its place in the list, which
is ordered by (request, index), after `left` have been taken out of it and `joined` put in.

    requests   [[number, id, status, finish reason, prompt tokens, cached tokens, preemptions, host blocks, arrived,
                 waited], ...]
    forgotten  [number, ...]                                     requests that are looked at no longer
    left       [place before, ...]      joined  [request, index, ...]
    next       [token or -1, ...]       one for each sequence that held blocks before: most gain one token a step
    tokens     [[place, kept, token, ...], ...]                  any other change: the first `kept` stay
    lengths    [place, tokens, ...]     instead of both, where a snapshot says how many tokens there are and not which
    grown      [place, block, ...]      one block more
    blocks     [[place, kept, block, ...], ...]                  any other change
    written    [place, tokens, ...]     where it is not what `_expected` says; and so for `placed`
    placed     [place, tokens, ...]
    cached     [block, ...]             blocks that entered or left the cached ones
    counters   [...]                    all of them, if one changed
"""

import bisect
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from jpaged.memory_view.snapshot import Counters, PoolShape, RequestState, SequenceState, Snapshot, Status

Frame = dict[str, Any]

_NO_TOKEN = -1


def empty(pool: PoolShape) -> Snapshot:
    """What there is before the first frame."""
    return Snapshot(pool, (), (), frozenset())


def difference(before: Snapshot, after: Snapshot) -> Frame:
    """The frame that `apply` makes `after` of."""
    old = {_key(s): s for s in before.sequences}
    new_keys = {_key(s) for s in after.sequences}
    requests, numbers = set(before.requests), {r.number for r in after.requests}
    frame: Frame = {
        "requests": [_flat_request(r) for r in after.requests if r not in requests],
        "forgotten": [r.number for r in before.requests if r.number not in numbers],
        "left": [place for place, s in enumerate(before.sequences) if _key(s) not in new_keys],
        "joined": [part for s in after.sequences if _key(s) not in old for part in _key(s)],
        "next": [],
        "tokens": [],
        "lengths": [],
        "grown": [],
        "blocks": [],
        "written": [],
        "placed": [],
        "cached": sorted(before.cached ^ after.cached),
        "counters": [] if before.counters == after.counters else list(dataclasses.astuple(after.counters)),
    }
    for place, sequence in enumerate(after.sequences):
        _add_sequence(frame, place, old.get(_key(sequence)) or _unknown(*_key(sequence)), sequence)
    if all(token == _NO_TOKEN for token in frame["next"]):
        frame["next"] = []
    return {key: value for key, value in frame.items() if value}


def _add_sequence(frame: Frame, place: int, old: SequenceState, new: SequenceState) -> None:
    if isinstance(new.tokens, range):
        if len(new.tokens) != len(old.tokens):
            frame["lengths"] += [place, len(new.tokens)]
    else:
        _add_tokens(frame, place, old, new)
    if new.blocks != old.blocks:
        kept = _common(old.blocks, new.blocks)
        if kept == len(old.blocks) == len(new.blocks) - 1:
            frame["grown"] += [place, new.blocks[-1]]
        else:
            frame["blocks"].append([place, kept, *new.blocks[kept:]])
    written, placed = _expected(old, new.tokens, new.blocks, new.written)
    if new.written != written:
        frame["written"] += [place, new.written]
    if new.placed != placed:
        frame["placed"] += [place, new.placed]


def _add_tokens(frame: Frame, place: int, old: SequenceState, new: SequenceState) -> None:
    one_more = len(new.tokens) == len(old.tokens) + 1 and new.tokens[:-1] == old.tokens
    if old.blocks:
        frame["next"].append(new.tokens[-1] if one_more else _NO_TOKEN)
    if new.tokens != old.tokens and not (old.blocks and one_more):
        kept = _common(old.tokens, new.tokens)
        frame["tokens"].append([place, kept, *new.tokens[kept:]])


def apply(before: Snapshot, frame: Frame) -> Snapshot:
    """The snapshot after `before`."""
    requests = {r.number: r for r in before.requests}
    for number in frame.get("forgotten", ()):
        del requests[number]
    for number, name, status, *rest in frame.get("requests", ()):
        requests[number] = RequestState(number, name, Status(status), *rest)
    left = set(frame.get("left", ()))
    sequences = [s for place, s in enumerate(before.sequences) if place not in left]
    for request, index in itertools.batched(frame.get("joined", ()), 2):
        bisect.insort(sequences, _unknown(request, index), key=_key)
    counters = Counters(*frame["counters"]) if "counters" in frame else before.counters
    return Snapshot(
        before.pool,
        tuple(requests[number] for number in sorted(requests)),
        _apply_to_sequences(sequences, frame),
        before.cached ^ frozenset(frame.get("cached", ())),
        counters,
    )


def _apply_to_sequences(old: list[SequenceState], frame: Frame) -> tuple[SequenceState, ...]:
    tokens, blocks = [s.tokens for s in old], [s.blocks for s in old]
    for place, length in itertools.batched(frame.get("lengths", ()), 2):
        tokens[place] = range(length)
    holders = (place for place, s in enumerate(old) if s.blocks)
    for place, token in zip(holders, frame.get("next", ()), strict=False):
        if token != _NO_TOKEN:
            tokens[place] = (*tokens[place], token)
    for place, kept, *rest in frame.get("tokens", ()):
        tokens[place] = (*tokens[place][:kept], *rest)
    for place, block in itertools.batched(frame.get("grown", ()), 2):
        blocks[place] += (block,)
    for place, kept, *rest in frame.get("blocks", ()):
        blocks[place] = blocks[place][:kept] + tuple(rest)
    written = dict(itertools.batched(frame.get("written", ()), 2))
    placed = dict(itertools.batched(frame.get("placed", ()), 2))
    after = []
    for place, sequence in enumerate(old):
        filled = written.get(place)
        if filled is None:
            filled, _ = _expected(sequence, tokens[place], blocks[place], None)
        _, reserved = _expected(sequence, tokens[place], blocks[place], filled)
        after.append(
            SequenceState(
                sequence.request,
                sequence.index,
                tokens[place],
                blocks[place],
                filled,
                placed.get(place, reserved),
            )
        )
    return tuple(after)


def _expected(
    old: SequenceState, tokens: Sequence[int], blocks: tuple[int, ...], written: int | None
) -> tuple[int, int]:
    """(written, placed) of a sequence that does what most do: what need not be said.

    It writes as many tokens as it gains, and has slots for all that it had at its admission.
    """
    if not blocks:
        return 0, 0
    expected = old.written + len(tokens) - len(old.tokens)
    filled = expected if written is None else written
    return expected, max(filled, old.placed) if old.blocks else len(tokens)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many items at their beginnings are equal."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(i for i in range(shorter) if one[i] != other[i])


def _key(sequence: SequenceState) -> tuple[int, int]:
    return sequence.request, sequence.index


def _unknown(request: int, index: int) -> SequenceState:
    return SequenceState(request, index, (), (), 0, 0)


def _flat_request(request: RequestState) -> list[Any]:
    return list(dataclasses.astuple(request))
