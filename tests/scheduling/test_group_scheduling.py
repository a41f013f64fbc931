"""Scheduler: groups that lose their blocks, go to host memory and come back; one behaviour a test."""

import pytest

from jpaged.errors import InvalidRequestError
from jpaged.sequence import FinishReason, Status
from tests.scheduling.support import engine, prompt


def settled(e):
    """Commits what is in flight, so that all groups may be preempted."""
    while e._in_flight:
        e._commit()


@pytest.mark.parametrize("length", [4, 8, 9])
def test_beams_that_find_all_but_their_last_tokens_in_the_cache(length):
    """Nothing is computed in the step that admits them; the device must hear of them all the same."""
    e = engine()
    group = e.add(prompt(length), 8, n=3, beams=True)
    e.step()
    settled(e)
    e.scheduler.preemption.preempt_all()
    e.drain()
    assert e.blocks.stats.hits == 3 * (length // 4 * 4)
    e.check_outputs()
    assert group.metrics.num_preemptions == 1


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("budget", [8, 20])
@pytest.mark.parametrize("length", [4, 5, 7, 8])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_beams_with_equal_tokens_are_computed_anew_each_by_itself(steps, length, budget, caching):
    """Five beams over a vocabulary of four: after the first token two are equal. They go on together all the same."""
    e = engine(rows=8, budget=budget, caching=caching)
    group = e.add(prompt(length), 8, n=5, beams=True)
    for _ in range(steps):
        e.step()
    settled(e)
    e.scheduler.preemption.preempt_all()
    assert steps > 1 or len({tuple(s.tokens) for s in group.sequences}) == 4
    e.drain()
    e.check_outputs()


def until_swapped(e, group):
    for _ in range(100):
        if group.status is Status.SWAPPED:
            return
        e.step()
    raise AssertionError("it was never swapped")


def swapping(**changes):
    return engine(**({"num_blocks": 14, "caching": False, "swap_blocks": 40, "budget": 64} | changes))


def test_a_group_goes_to_host_memory_and_comes_back_with_what_it_had():
    e = swapping()
    e.add(prompt(15), 24)
    group = e.add(prompt(11, 1), 12, n=3)
    until_swapped(e, group)
    shared, own = 2, 3 * 2
    assert e.scheduler.swap_space.num_used == shared + own, "what the samples share is swapped once"
    e.drain()
    assert (e.scheduler.num_swaps_out, e.scheduler.num_swaps_in, e.scheduler.tokens_lost) == (1, 1, 0)
    e.check_outputs()


def test_swapped_groups_are_back_before_anyone_is_admitted():
    e = swapping()
    e.add(prompt(15), 24)
    group = e.add(prompt(11, 1), 12, n=3)
    until_swapped(e, group)
    late = e.add(prompt(2, 2), 2)
    assert e.blocks.num_free > e.blocks.blocks_for(4), "the late one would fit"
    while group.status is Status.SWAPPED:
        assert late.status is Status.WAITING
        e.step()
    assert group.status is Status.RUNNING
    e.drain()
    e.check_outputs()


def test_several_swapped_groups_come_back_by_order():
    e = swapping(num_blocks=22, rows=8)
    e.add(prompt(31), 30)
    groups = [e.add(prompt(11, i), 16, n=2) for i in (1, 2)]
    until_swapped(e, groups[0])
    assert [g.status for g in groups] == [Status.SWAPPED] * 2
    back = []
    while e.scheduler.num_swapped:
        e.step()
        back += [g for g in groups if g.status is Status.RUNNING and g not in back]
    assert back == groups
    e.drain()
    e.check_outputs()


def test_a_sequence_that_ends_while_its_group_is_swapped_does_not_come_back():
    e = swapping()
    e.add(prompt(15), 24)
    group = e.add(prompt(11, 1), 12, n=3)
    until_swapped(e, group)
    ended, *others = group.sequences
    e.scheduler.finish(ended, FinishReason.STOP, "text")
    swapped, _ = e.scheduler.roster.swapped[group]
    while group.status is Status.SWAPPED:
        e.step()
    plan = e._in_flight[-1][0]
    assert plan.admitted == others
    [back] = plan.swaps_in
    assert len(back.indices) == len(swapped.blocks) - 2, "the blocks that were its own stay away"
    e.drain()
    e.check_outputs()


def test_a_swapped_group_that_ends_gives_up_its_room():
    for end in ("abort", "finish"):
        e = swapping()
        e.add(prompt(15), 24)
        group = e.add(prompt(11, 1), 12, n=3)
        until_swapped(e, group)
        if end == "abort":
            e.abort(group)
        else:
            for sequence in group.sequences:
                e.scheduler.finish(sequence, FinishReason.STOP, "text")
        assert group.finished
        assert (e.scheduler.swap_space.num_used, e.scheduler.num_swapped) == (0, 0)
        e.drain()
        assert e.scheduler.num_swaps_in == 0
        e.check_outputs()


@pytest.mark.parametrize("room", [0, 7, 8])
def test_without_host_room_a_group_is_computed_anew(room):
    e = swapping(swap_blocks=room)
    e.add(prompt(15), 24)
    group = e.add(prompt(11, 1), 12, n=3)
    while not group.metrics.num_preemptions:
        e.step()
    assert group.status is (Status.SWAPPED if room == 8 else Status.WAITING)
    e.drain()
    assert (e.scheduler.num_swaps_out > 0) == (room == 8)
    e.check_outputs()


@pytest.mark.parametrize(("mode", "single", "many"), [("auto", 0, 1), ("swap", 1, 1), ("recompute", 0, 0)])
def test_the_policy_says_who_is_swapped(mode, single, many):
    for n, swaps in ((1, single), (3, many)):
        e = swapping(num_blocks=14 if n == 3 else 8, preemption_mode=mode)
        e.add(prompt(15), 12)
        e.add(prompt(11, 1), 12, n=n)
        e.drain()
        assert e.scheduler.num_preemptions > 0
        assert (e.scheduler.num_swaps_out > 0) == bool(swaps)
        e.check_outputs()


def test_half_a_prompt_is_not_worth_the_copies():
    """A group that loses its blocks while its prompt is computed waits again, whatever the policy."""
    e = swapping(num_blocks=12, budget=8, preemption_mode="swap")
    e.add(prompt(15), 16)
    group = e.add(prompt(26, 1), 3)
    while not group.metrics.num_preemptions:
        assert group.sequences[0].num_output_tokens == 0
        e.step()
    assert (group.status, e.scheduler.num_swaps_out) == (Status.WAITING, 0)
    e.drain()
    e.check_outputs()


def test_what_is_too_wide_is_refused_while_others_run():
    e = engine(num_blocks=12, rows=4)
    running = [e.add(prompt(9), 12, n=2), e.add(prompt(5, 1), 6, n=2, beams=True)]
    e.step()
    for beams in (False, True):
        with pytest.raises(InvalidRequestError, match=r"5 sequences .* do not fit into max_num_seqs=4: ask for fewer"):
            e.add(prompt(3), 2, n=5, beams=beams)
        with pytest.raises(
            InvalidRequestError, match=r"may need 14 blocks .* whole pool has 12: lower max_tokens, n or"
        ):
            e.add(prompt(9), 12, n=4, beams=beams)  # 2 shared, 3 for each
    e.step()
    assert [g.status for g in running] == [Status.RUNNING] * 2
    e.add(prompt(9), 8, n=4, beams=True)  # 2 shared, 2 for each
    e.drain()
    e.check_outputs()


def test_a_sequence_waits_for_the_one_that_computes_what_it_shares():
    """Samples that differ in their last tokens alone begin anew: the first takes several steps for the others' prompt."""
    e = engine(budget=8, max_tiles=1, caching=False)
    group = e.add(prompt(16), 12, n=3)
    while e.scheduler.batch.position[0] < 16:
        e.step()
    settled(e)
    assert len({tuple(s.tokens) for s in group.sequences}) > 1
    assert {len(s.tokens) for s in group.sequences} == {17}
    e.scheduler.preemption.preempt_all()
    e.device.pool[:] = 0
    e.drain()
    e.check_outputs()
