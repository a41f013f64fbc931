"""Scheduler: one behaviour a test, on hand-made loads. Random ones: test_scheduler_machine.py."""

import numpy as np
import pytest

from jpaged.errors import InvalidRequestError
from jpaged.sampling_params import SamplingParams
from jpaged.scheduling import Bucket, StepPlan, Tile, Variant
from jpaged.scheduling.plan import Edits, make_buckets, sampling_variant, smallest_bucket
from jpaged.scheduling.sharing import Piece
from jpaged.sequence import FinishReason, Status
from tests.scheduling.support import engine, prompt


def planned(e):
    """Schedules one step and runs it; (rows decoded, tiles as (start, length, samples))."""
    e.step()
    plan = e._in_flight[-1][0]
    return plan.positions.tolist(), [(t.start, t.length, t.samples) for t in plan.tiles]


def test_a_prompt_goes_through_the_prefill_lane_and_then_one_token_a_step():
    e = engine()
    e.add(prompt(10), 3)
    assert planned(e) == ([], [(0, 4, False), (4, 4, False), (8, 2, True)])
    assert planned(e) == ([10], [])
    assert planned(e) == ([11], [])
    e.drain()
    e.check_outputs()


def test_decodes_and_chunks_share_a_step_and_its_budget():
    e = engine(budget=9)
    e.add(prompt(3), 8)
    e.add(prompt(20, 1), 2)
    assert planned(e) == ([], [(0, 3, True), (0, 4, False)])
    assert planned(e) == ([3], [(4, 4, False), (8, 4, False)])
    assert planned(e) == ([4], [(12, 4, False), (16, 4, True)])
    assert planned(e) == ([5, 20], [])
    e.drain()
    e.check_outputs()


def test_a_request_waits_while_the_budget_is_spent():
    e = engine(budget=8)
    e.add(prompt(16), 1)
    late = e.add(prompt(3, 1), 1)
    e.step()
    assert late.status is Status.WAITING
    e.step()
    e.step()
    assert late.status is Status.RUNNING


def test_rows_limit_the_batch():
    e = engine(rows=2)
    groups = [e.add(prompt(3, i), 3) for i in range(3)]
    e.step()
    assert [g.status for g in groups] == [Status.RUNNING, Status.RUNNING, Status.WAITING]
    e.drain()
    assert e.first_scheduled == groups
    e.check_outputs()


def test_samples_of_one_request_run_together_or_wait_together():
    e = engine(rows=4)
    first = e.add(prompt(3), 4, n=2)
    second = e.add(prompt(3, 1), 4, n=3)
    e.step()
    assert (first.status, second.status) == (Status.RUNNING, Status.WAITING)
    assert {s.row for s in first.sequences} == {0, 1}
    e.drain()
    e.check_outputs()


def test_admission_does_not_go_past_a_request_that_does_not_fit_yet():
    e = engine(num_blocks=6)
    e.add(prompt(12), 4)
    big, small = e.add(prompt(16, 1), 4), e.add(prompt(2, 2), 2)
    e.step()
    assert (big.status, small.status) == (Status.WAITING, Status.WAITING)
    e.drain()
    assert e.first_scheduled.index(big) < e.first_scheduled.index(small)


def test_admission_leaves_the_watermark_free_unless_nobody_runs():
    e = engine(num_blocks=10, watermark=0.2)
    assert e.blocks.watermark_blocks == 2
    alone = e.add(prompt(36), 4)
    e.step()
    assert alone.status is Status.RUNNING, "9 of 10 blocks"
    e.drain()
    e.add(prompt(16), 8)
    other = e.add(prompt(17, 1), 4)
    e.step()
    assert other.status is Status.WAITING, "5 of the 6 blocks left would leave only one free"
    e.drain()


def test_priority_goes_before_arrival():
    e = engine(rows=1)
    e.add(prompt(3), 4)
    e.step()
    low, high = e.add(prompt(3, 1), 2, priority=5), e.add(prompt(3, 2), 2, priority=-5)
    e.drain()
    assert e.first_scheduled[1:] == [high, low]


def test_the_newest_is_preempted_computed_again_and_loses_nothing():
    e = engine(num_blocks=8, caching=False)
    old, new = e.add(prompt(15), 12), e.add(prompt(15, 1), 12)
    while not e.scheduler.num_preemptions:
        e.step()
    assert (old.status, new.status) == (Status.RUNNING, Status.WAITING)
    assert new.metrics.num_preemptions == 1
    assert e.scheduler.tokens_lost == 15
    e.drain()
    e.check_outputs()


def test_a_lower_priority_is_preempted_although_it_came_first():
    e = engine(num_blocks=8, caching=False)
    low = e.add(prompt(15), 12, priority=1)
    high = e.add(prompt(15, 1), 12)
    e.drain()
    assert (low.metrics.num_preemptions > 0, high.metrics.num_preemptions) == (True, 0)
    e.check_outputs()


def test_a_preempted_request_finds_its_own_blocks_again():
    e = engine(num_blocks=9)
    e.add(prompt(15), 14)
    new = e.add(prompt(15, 1), 14)
    while not e.scheduler.num_preemptions:
        e.step()
    hits = e.blocks.stats.hits
    while new.status is not Status.RUNNING:
        e.step()
    assert e.blocks.stats.hits > hits
    e.drain()
    e.check_outputs()


def until_preempted(e, group) -> int:
    """Steps until the group is preempted; returns the output tokens that its first sequence had before that step."""
    while group.metrics.num_preemptions == 0:
        before = group.sequences[0].num_output_tokens
        e.step()
    return before


def test_a_token_that_arrives_after_the_preemption_is_kept():
    """Step N samples it, schedule N+1 preempts its sequence, then N is committed."""
    e = engine(num_blocks=8, budget=64, caching=False)
    e.add(prompt(15), 12)
    new = e.add(prompt(15, 1), 12)
    before = until_preempted(e, new)
    assert new.sequences[0].num_output_tokens == before + 1
    e.drain()
    e.check_outputs()


def test_a_sequence_may_end_while_it_is_preempted():
    """Its last token was on the device when its blocks were taken."""
    e = engine(num_blocks=8, budget=64, caching=False)
    e.add(prompt(15), 12)
    new = e.add(prompt(15, 1), 2)
    assert until_preempted(e, new) == 1
    assert (new.sequences[0].finish_reason, new.finished) == (FinishReason.LENGTH, True)
    assert e.scheduler.num_waiting == 0
    e.drain()
    e.check_outputs()


def test_samples_of_a_preempted_request_may_end_one_by_one():
    e = engine(num_blocks=11, budget=64, caching=False)
    e.add(prompt(15), 12)
    group = e.add(prompt(11, 1), 8, n=2)
    until_preempted(e, group)
    e.scheduler.finish(group.sequences[0], FinishReason.STOP, "text")
    assert (group.status, e.scheduler.num_waiting) == (Status.WAITING, 1)
    e.drain()
    assert group.sequences[1].finish_reason is FinishReason.LENGTH
    e.check_outputs()


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 7])
def test_abort_in_any_state(steps):
    e = engine(rows=2, budget=8)
    groups = [e.add(prompt(18, i), 6) for i in range(3)]
    for _ in range(steps):
        e.step()
    for group in groups:
        e.abort(group)
        e.abort(group)  # again: no harm
    assert all(g.finished and g.sequences[0].finish_reason is FinishReason.ABORT for g in groups)
    assert (e.blocks.num_used, e.scheduler.num_waiting, e.scheduler.running) == (0, 0, [])
    after = e.add(prompt(18), 6)
    e.drain()
    assert after.sequences[0].finish_reason is FinishReason.LENGTH
    e.check_outputs()


def test_a_stop_token_ends_a_sequence_and_the_step_ahead_of_it_is_dropped():
    e = engine()
    group = e.add(prompt(5), 30, stop=True)
    e.drain()
    sequence = group.sequences[0]
    assert sequence.finish_reason is FinishReason.STOP
    assert len(sequence.output_token_ids) < 30
    e.check_outputs()


def test_a_stop_token_that_nobody_asked_for_is_the_models_own():
    e = engine()
    group = e.add(prompt(5), 30)
    group.sequences[0].stop_token_ids = frozenset({0, 1, 2, 3})
    e.drain()
    assert (group.sequences[0].finish_reason, group.sequences[0].stop_reason) == (FinishReason.STOP, None)


def test_a_prompt_that_is_being_computed_is_shared_in_the_same_step():
    e = engine(budget=64)
    first, second = e.add(prompt(13), 4), e.add([*prompt(12), 9, 9], 4)
    e.step()
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 12)
    e.drain()
    e.check_outputs()


def test_outputs_are_shared_as_prompts_are():
    e = engine()
    first = e.add(prompt(6), 10)
    e.drain()
    again = e.add(first.sequences[0].tokens[:15], 2)
    e.drain()
    assert again.num_cached_tokens == 12
    e.check_outputs()


def test_prompt_logprobs_compute_every_position():
    e = engine()
    e.add(prompt(13), 2)
    e.drain()
    again = e.add(prompt(13), 2, prompt_logprobs=0)
    e.drain()
    assert again.num_cached_tokens == 0


def test_what_can_never_fit_is_refused_at_once_and_the_rest_is_not():
    e = engine(num_blocks=4, rows=2, max_len=40)
    with pytest.raises(InvalidRequestError, match="max_num_seqs=2"):
        e.add(prompt(2), 1, n=3)
    with pytest.raises(InvalidRequestError, match="may need 5 blocks of 4 tokens and the whole pool has 4"):
        e.add(prompt(9), 9)
    with pytest.raises(InvalidRequestError, match="lower max_tokens, n or the number of beams"):
        e.add(prompt(5), 5, n=2)
    assert not e.scheduler.has_work
    e.add(prompt(9), 8)  # 17 tokens, the last of which is never computed
    e.add(prompt(4), 5, n=2)
    e.drain()
    e.check_outputs()


def test_every_step_fits_its_bucket_even_if_tiles_are_few():
    e = engine(budget=100, max_tiles=2, rows=4)
    for i in range(6):
        e.add(prompt(20, i), 6)
    e.drain()
    e.check_outputs()


def test_nothing_to_do_is_no_plan():
    assert engine().scheduler.schedule() is None


# ---------------------------------------------------------------------------------------------------------- plans


def test_pack_pads_with_the_null_row():
    plan = StepPlan(
        bucket=Bucket(4, 2),
        variant=Variant(),
        swaps_out=[],
        swaps_in=[],
        edits=Edits(),
        admitted=[],
        copies=[(8, 9)],
        sequences=[],
        rows=np.array([4, 1], np.int32),
        positions=np.array([9, 16], np.int32),
        new_blocks=np.array([[0], [7]], np.int32),
        tiles=[Tile(None, 5, 32, 17, True)],
        sampling=[None] * 4,
        result_rows=np.array([4, 1, 5, 6], np.int32),
        result_tokens=np.array([0, 1, 19, 19], np.int32),
        shared=[Piece([1, 0], 2), Piece([0, 1], 1)],  # one more than the bucket has room for
        guesses=[],
        beams=[],
    )
    assert plan.pack(99).reshape(-1).tolist() == [
        *(4, 1, 99, 99),
        *(9, 16, 0, 0),
        *(0, 7, 0, 0),  # decode lane: rows, positions, new blocks
        *(5, 99),
        *(32, 0),
        *(17, 0),
        *(4, 1, 5, 6, 99, 99),  # tiles: rows, starts, lengths
        *(0, 1, 19, 19, 0, 0),  # results: rows, tokens
        *(8, 0, 0, 0, 0, 0),
        *(9, 0, 0, 0, 0, 0),
        1,  # copies: sources, destinations, and how many they are
        *(1, 0, *[-1] * 6, 2),  # a shared piece: members, blocks
    ]
    assert plan.num_tokens == 19


def test_a_step_runs_in_the_cheapest_bucket_that_holds_it():
    buckets = make_buckets(64, 16, 32)
    assert smallest_bucket(buckets, 1, 0, 1) == Bucket(1, 0)
    assert smallest_bucket(buckets, 17, 0, 17) == Bucket(32, 0)
    assert smallest_bucket(buckets, 0, 1, 1) == Bucket(8, 4)
    assert smallest_bucket(buckets, 9, 5, 14) == Bucket(32, 16)
    assert smallest_bucket(buckets, 2, 1, 40) == Bucket(64, 4), "many samples of one prompt are many results"
    with pytest.raises(ValueError, match="no bucket"):
        smallest_bucket(buckets, 65, 0, 65)


@pytest.mark.parametrize("seqs", [1, 2, 3, 7, 8, 64, 100, 256, 1024, 4096])
@pytest.mark.parametrize("tiles", [1, 2, 5, 16, 64])
def test_default_buckets_are_about_a_dozen_and_hold_every_step(seqs, tiles):
    buckets = make_buckets(seqs, tiles, 32)
    assert len(buckets) == len(set(buckets)) <= 13
    for rows in {0, 1, seqs // 2, seqs}:
        for count in {0, 1, tiles}:
            smallest_bucket(buckets, rows, count, max(rows, min(rows + count, seqs)))


def test_a_step_asks_for_what_its_requests_ask_for():
    greedy = SamplingParams(temperature=0)
    assert sampling_variant(greedy) == Variant()
    assert sampling_variant(SamplingParams()) == Variant(sample=True)
    assert sampling_variant(SamplingParams(top_k=-1)) == Variant(sample=True)
    assert sampling_variant(SamplingParams(min_p=0.1)) == Variant(sample=True, truncate=True)
    assert sampling_variant(SamplingParams(temperature=0, top_p=0.5)) == Variant(), "greedy needs no filter"
    assert sampling_variant(SamplingParams(temperature=0, min_tokens=1, presence_penalty=1)) == Variant(
        rules=True, penalties=True
    )
    assert [sampling_variant(SamplingParams(temperature=0, logprobs=k)).num_logprobs for k in (0, 1, 5, 6, 20)] == [
        0,
        5,
        5,
        20,
        20,
    ]


def test_the_variant_follows_who_runs():
    e = engine()
    e.add(prompt(3), 2)
    e.step()
    assert e._in_flight[-1][0].variant == Variant(sample=True)
    e.add(prompt(6), 2, prompt_logprobs=3)
    e.step()
    assert e._in_flight[-1][0].variant == Variant(sample=True, prompt_logprobs=True, num_logprobs=5)
    e.drain()


@pytest.mark.parametrize(("windows", "num_blocks"), [((8,), 6), ((None, 8), 11), ((None, 8, 8), 9)])
def test_layers_with_a_window_get_the_blocks_of_a_long_prompt_chunk_by_chunk(windows, num_blocks):
    """Sixty tokens are 15 blocks for every layer group; two requests, in a pool that has room for one."""
    e = engine(num_blocks=num_blocks, windows=windows, budget=8, max_tiles=1, caching=False)
    for first in range(2):
        e.add(prompt(50, first), 10)
    peak = np.zeros(len(windows), int)
    while e.has_work:
        e.step()
        e.check_tables()
        peak = np.maximum(peak, (e.blocks.by_group > 0).sum(1).max(0))
    e.check_outputs()
    assert peak.tolist() == [15 if window is None else 4 for window in windows], "a window, a chunk, and one more"
    with pytest.raises(InvalidRequestError, match="the whole pool has"):
        engine(num_blocks=num_blocks - 1, windows=windows, budget=8, max_tiles=1).add(prompt(50), 10)
