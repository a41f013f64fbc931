"""Roster: which groups wait, run, or are swapped out; each in one of these states, and nowhere else."""

import heapq
from collections import Counter

from jpaged.memory import Swapped
from jpaged.scheduling.plan import Variant, variant_of
from jpaged.sequence import Sequence, SequenceGroup, Status


class Roster:
    """The unfinished groups by state. Moves change `group.status`, and nothing but that."""

    def __init__(self) -> None:
        self.running: list[SequenceGroup] = []
        self.swapped: dict[SequenceGroup, tuple[Swapped, list[Sequence]]] = {}
        """Where a group's blocks are, and which sequences that is about."""
        self.num_waiting = 0
        self.num_waiting_tokens = 0
        """Prompt tokens of the waiting groups."""
        self.variants: Counter[Variant] = Counter()
        """What the running groups ask of the sampler."""
        self._waiting: list[tuple[tuple[int, int], SequenceGroup]] = []  # a heap; who left it otherwise is skipped

    def __bool__(self) -> bool:
        return bool(self.num_waiting or self.running or self.swapped)

    @property
    def unfinished(self) -> list[SequenceGroup]:
        return [*self.running, *self.swapped, *self.waiting]

    def wait(self, group: SequenceGroup) -> None:
        group.status = Status.WAITING
        heapq.heappush(self._waiting, (group.order, group))
        self.num_waiting += 1
        self.num_waiting_tokens += len(group.prompt_token_ids)

    def next_waiting(self) -> SequenceGroup | None:
        while self._waiting and self._waiting[0][1].status is not Status.WAITING:
            heapq.heappop(self._waiting)
        return self._waiting[0][1] if self._waiting else None

    @property
    def waiting(self) -> list[SequenceGroup]:
        """The next to be admitted first."""
        waiting = {group for _, group in self._waiting if group.status is Status.WAITING}  # some stand there twice
        return sorted(waiting, key=lambda group: group.order)

    def next_swapped(self) -> SequenceGroup:
        return min(self.swapped, key=lambda group: group.order)

    def newest_running(self) -> SequenceGroup:
        return max(self.running, key=lambda group: group.order)

    def run(self, group: SequenceGroup) -> None:
        self.leave(group)
        group.status = Status.RUNNING
        self.running.append(group)
        self.variants[variant_of(group)] += 1

    def swap(self, group: SequenceGroup, swapped: Swapped, sequences: list[Sequence]) -> None:
        self.leave(group)
        group.status = Status.SWAPPED
        self.swapped[group] = swapped, sequences

    def leave(self, group: SequenceGroup) -> None:
        """Takes a group out of its state; FINISHED unless it is put into another."""
        if group.status is Status.WAITING:
            self.num_waiting -= 1
            self.num_waiting_tokens -= len(group.prompt_token_ids)
        elif group.status is Status.SWAPPED:
            del self.swapped[group]
        elif group.status is Status.RUNNING:
            self.running.remove(group)
            variant = variant_of(group)
            self.variants[variant] -= 1
            if not self.variants[variant]:
                del self.variants[variant]
        group.status = Status.FINISHED
