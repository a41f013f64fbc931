"""A picture of a server as lines for a terminal."""

import re

from jpaged.cli.top.reader import Picture
from jpaged.memory_view.snapshot import RequestState, SequenceState, Snapshot, Status, measure
from jpaged.memory_view.terminal import block_map, in_colour, percent, printable

_BOLD, _DIM, _RED, _GREEN, _END = "\x1b[1m", "\x1b[2m", "\x1b[31m", "\x1b[32m", "\x1b[0m"
_GAUGE = 24
_STATES = {Status.RUNNING: _GREEN, Status.PREEMPTED: _RED, Status.SWAPPED: _RED}


def draw(picture: Picture, url: str, width: int, height: int) -> list[str]:
    """At most `height` lines; with their codes, they may be wider than `width`."""
    lines = [*_head(picture, url, width), ""]
    if picture.snapshot is None:
        lines.append("For the pool and the requests, start the server with --enable-ui.")
        return lines[:height]
    snapshot = picture.snapshot
    room = max(2, height - len(lines) - 2)  # a blank line between the map and the table, and the table's head
    table_rows = min(len(snapshot.requests), max(1, room // 2))
    lines += block_map(snapshot, columns=max(8, width - 1), rows=max(1, room - table_rows))
    lines += ["", *_table(picture, snapshot, height - len(lines) - 2, width)]
    return lines[:height]


def plain(line: str) -> str:
    """Without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", line)


def _head(picture: Picture, url: str, width: int) -> list[str]:
    up = "" if picture.uptime is None else f"up {duration(picture.uptime)}"
    left, right = f"{printable(picture.title)}  {printable(url)}", printable(picture.problem) or up
    gap = " " * max(2, width - 1 - len(left) - len(right))
    waits = "–"
    if picture.ttft is not None:
        waits = f"{duration(picture.ttft[0])}, p99 {duration(picture.ttft[1])}"
    elif picture.mean_ttft is not None:
        waits = f"{duration(picture.mean_ttft)} on average"
    ended = picture.ended
    return [
        f"{_BOLD}{left}{_END}{gap}{_RED if picture.problem else _DIM}{right}{_END}",
        f"generating {_rate(picture.generated)} | prompts {_rate(picture.prompt)} | first token {waits}",
        f"{picture.running} running | {picture.waiting} waiting | {picture.swapped} swapped"
        f" | prefix hits {percent(picture.cached_tokens, picture.prompt_tokens)}"
        f" | done {ended.get('stop', 0) + ended.get('length', 0):,}"
        f" | aborted {ended.get('abort', 0):,} | failed {ended.get('error', 0) + picture.rejected:,}",
        _pool(picture),
    ]


def _pool(picture: Picture) -> str:
    full = round(_GAUGE * picture.pool_usage)
    gauge = f"{'█' * full}{_DIM}{'░' * (_GAUGE - full)}{_END} {100 * picture.pool_usage:.0f} %"
    if picture.snapshot is None:
        return f"pool {gauge} | preempted {picture.preemptions:,}"
    counters, m, shape = picture.snapshot.counters, measure(picture.snapshot), picture.snapshot.pool
    return (
        f"pool {gauge} of {shape.num_blocks - 1:,} blocks x {shape.block_size} | shared {m.shared:,}"
        f" | cached {m.cached:,} | preempted {counters.preemptions:,} ({counters.tokens_lost:,} tokens lost)"
        f" | swaps {counters.swaps_out:,} out, {counters.swaps_in:,} in"
    )


def _table(picture: Picture, snapshot: Snapshot, rows: int, width: int) -> list[str]:
    """The requests, oldest first, and how many more there are."""
    names = max(16, min(44, width - 54))
    head = f"{_DIM}  {'REQUEST':<{names}} {'STATE':<10}{'TOKENS':>14}{'BLOCKS':>8}{'WAITED':>9}{'AGE':>9}{_END}"
    by_request: dict[int, list[SequenceState]] = {}
    for sequence in snapshot.sequences:
        by_request.setdefault(sequence.request, []).append(sequence)
    requests = snapshot.requests
    shown = requests if len(requests) <= rows else requests[: max(0, rows - 1)]
    lines = [_row(request, by_request.get(request.number, []), picture.now, names) for request in shown]
    if len(requests) > len(shown):
        lines.append(f"{_DIM}  and {len(requests) - len(shown):,} more{_END}")
    return [head, *lines]


def _row(request: RequestState, sequences: list[SequenceState], now: int, names: int) -> str:
    name = printable(request.request_id)
    samples = f" ×{len(sequences)}" if len(sequences) > 1 else ""
    if len(name) + len(samples) > names:
        name = name[: names - len(samples) - 1] + "…"
    blocks = len({block for sequence in sequences for block in sequence.blocks if block}) or request.host_blocks
    colour = _STATES.get(request.status, _DIM)
    row = f"{in_colour(request.number, '█')} {name + samples:<{names}} {colour}{request.status.value:<10}{_END}"
    if request.status is Status.PARKED:
        return f"{row}{'':>14}{blocks:>8,}"
    generated = sum(len(sequence.tokens) - request.prompt_tokens for sequence in sequences)
    age = max(0, now - request.arrived)
    waited = age if request.waited < 0 else request.waited
    tokens = f"{request.prompt_tokens:,} + {generated:,}"
    return f"{row}{tokens:>14}{blocks:>8,}{duration(waited / 1000):>9}{duration(age / 1000):>9}"


def duration(seconds: float) -> str:
    """As short as it may be."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f} tokens/s" if value < 100 else f"{value:,.0f} tokens/s"
