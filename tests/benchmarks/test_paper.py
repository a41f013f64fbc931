"""The paper's baselines and the simulation, on workloads small enough to know the answer beforehand."""

import csv
import gzip
import itertools
import json

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from benchmarks.paper import traces
from benchmarks.paper.beam_traces import RecordedBeams, SyntheticBeams
from benchmarks.paper.buddy import BuddyAllocator
from benchmarks.paper.cost import MODELS, CostModel, Work
from benchmarks.paper.figures import FIGURES
from benchmarks.paper.memory_use import MemoryUse
from benchmarks.paper.published import BLOCK_SIZES, FIG19A_SWAP
from benchmarks.paper.report import markdown
from benchmarks.paper.scenario import Scenario, capacity
from benchmarks.paper.simulate import simulate
from benchmarks.paper.store import Store
from benchmarks.paper.systems import SYSTEMS, Settings, make_group, make_scheduler
from benchmarks.paper.traces import Request
from benchmarks.prefix_cache_trace import through_cache, through_lru
from jpaged.errors import InvalidRequestError


class OneSecond(CostModel):
    """A device that takes a second for every step."""

    def __init__(self):
        super().__init__(MODELS["opt-13b"])

    def step(self, work: Work) -> float:
        return 1.0


def serve(system, requests, *, slots, observe=None, n=1, beams=None, **fields):
    """Runs requests that all arrive at once, with every promise checked at every step."""
    scheduler = make_scheduler(system, Settings(slots=slots, **fields))

    def look(now, scheduler):
        scheduler.blocks.check_invariants()
        if observe:
            observe(now, scheduler)

    arrivals = iter([Request(0.0, p, o) for p, o in requests])
    outcome = simulate(scheduler, OneSecond(), arrivals, n=n, beams=beams, observe=look)
    assert scheduler.blocks.num_used == 0
    return outcome


# -------------------------------------------------------------------------------------------------------- buddies


@given(st.integers(1, 200), st.integers(0, 5), st.lists(st.tuples(st.booleans(), st.integers(1, 40))))
def test_buddy_chunks_never_overlap_and_merge_again(num_blocks, order, steps):
    buddies = BuddyAllocator(num_blocks + 1, 1 << order)
    taken = []
    for allocate, size in steps:
        if allocate and buddies.fits([size]):
            chunk = buddies.allocate_chunk(size)
            assert len(chunk) >= size > len(chunk) // 2
            taken.append(chunk)
        elif taken:
            buddies.free_chunk(taken.pop(size % len(taken))[0])
        blocks = list(itertools.chain(*taken))
        assert buddies.num_free == num_blocks - len(blocks)
        buddies.check_invariants(blocks)
    for chunk in taken:
        buddies.free_chunk(chunk[0])
    fresh = BuddyAllocator(num_blocks + 1, 1 << order)
    assert {n: set(c) for n, c in buddies._free.items()} == {n: set(c) for n, c in fresh._free.items()}


sizes_of_chunks = st.lists(st.integers(1, 16), max_size=12)


@given(st.integers(1, 100), sizes_of_chunks, sizes_of_chunks)
def test_what_fits_together_can_be_allocated_together(num_blocks, taken, wanted):
    buddies = BuddyAllocator(num_blocks + 1, 16)
    for size in taken:
        if buddies.fits([size]):
            buddies.allocate_chunk(size)
    promised, kept = buddies.fits(wanted), True
    for size in sorted(wanted, reverse=True):
        kept = kept and buddies.fits([size])
        if kept:
            buddies.allocate_chunk(size)
    assert promised == kept


def test_a_pool_that_is_no_power_of_two_has_the_chunks_of_its_bits():
    buddies = BuddyAllocator(983 + 1, 128)  # OPT-13B's pool on an A100-40GB
    assert buddies.fits([128] * 7)
    assert not buddies.fits([128] * 8)
    assert buddies.fits([128] * 7 + [64, 16, 4, 2, 1])


# ------------------------------------------------------------------------------------------------------ baselines


@pytest.mark.parametrize(("system", "batch"), [("orca-max", 1), ("orca-pow2", 4), ("orca-oracle", 8), ("jpaged", 8)])
def test_orca_runs_as_many_as_it_reserves_for(system, batch):
    # 8 requests of 8 + 17 tokens in 256 slots: two blocks of 16 each; Pow2 makes 17 to 32, 40 tokens to a chunk of 4.
    seen = []
    outcome = serve(system, [(8, 17)] * 8, slots=256, max_len=256, observe=lambda now, s: seen.append(len(s.running)))
    assert outcome.finished == 8
    assert max(seen) == batch
    assert outcome.steps == 17 * 8 // batch
    assert outcome.preemptions == 0


def test_orca_reserves_all_that_a_sequence_will_ever_hold():
    scheduler = make_scheduler("orca-oracle", Settings(slots=256, max_len=256))
    scheduler.add(make_group(Request(0.0, 8, 90), 0))
    scheduler.schedule()
    [row] = np.flatnonzero(scheduler.blocks.counts)
    table = scheduler.blocks.tables[row]
    assert scheduler.blocks.counts[row] == 8
    assert (np.diff(table[:8]) == 1).all()


def test_orca_refuses_what_can_never_be_reserved():
    scheduler = make_scheduler("orca-max", Settings(slots=240, max_len=256))
    with pytest.raises(InvalidRequestError, match="chunks of 256 tokens"):
        scheduler.add(make_group(Request(0.0, 8, 8), 0))


def test_a_faster_transformer_batch_ends_when_its_longest_output_does():
    latencies = serve("ft", [(4, 3), (4, 10), (4, 5)], slots=2048, ft_batch=2)
    # The first two end after 10 steps, the third 5 later.
    assert latencies.steps == 15
    assert latencies.normalized_latency == pytest.approx((10 / 3 + 10 / 10 + 15 / 5) / 3)


def test_a_faster_transformer_batch_is_cut_where_prompt_and_output_are_too_long_together():
    batches = []
    serve("ft", [(1950, 4), (4, 100)], slots=8192, ft_batch=2, observe=lambda now, s: batches.append(len(s.running)))
    assert set(batches) == {1}


def test_iteration_level_scheduling_lets_each_request_end_by_itself():
    outcome = serve("orca-oracle", [(4, 3), (4, 10)], slots=2048)
    assert outcome.normalized_latency == 1.0


# --------------------------------------------------------------------------------------------------------- groups


def test_orca_gives_each_sample_a_chunk_and_copies_the_prompt_into_it():
    scheduler = make_scheduler("orca-oracle", Settings(slots=256, max_len=256))
    scheduler.add(make_group(Request(0.0, 20, 10), 0, n=3))
    plan = scheduler.schedule()
    assert not plan.copies  # the prompt is being computed
    tables = [scheduler.blocks.tables[s.row, :2].tolist() for s in plan.sampling]
    assert len({block for table in tables for block in table}) == 6
    scheduler.commit(plan, np.zeros((3, 1), np.int32))
    copies = scheduler.schedule().copies
    assert sorted(copies) == sorted(zip(2 * tables[0], tables[1] + tables[2], strict=True))
    assert not scheduler.schedule().copies


def test_orca_starts_a_group_when_all_its_chunks_fit():
    seen = []
    serve("orca-oracle", [(8, 8)] * 4, slots=80, n=3, observe=lambda now, s: seen.append(len(s.running)))
    assert set(seen) == {1}  # five blocks: two groups of three would need six


def test_parallel_samples_share_the_full_blocks_of_their_prompt():
    # 40 tokens of prompt: two full blocks and a part; after the first token each of the three has that part for itself.
    use = MemoryUse(2, 4)
    serve("jpaged", [(40, 5)], slots=1600, n=3, observe=use)
    assert use.means()["saved"] == pytest.approx(1 - (2 + 3) / 9)


@pytest.mark.parametrize("system", ["jpaged", "orca-oracle", "orca-pow2", "orca-max"])
def test_beam_searches_end_under_pressure(system):
    lengths = [(7, 30), (33, 12), (1, 50), (20, 20), (16, 16)]
    outcome = serve(system, lengths, slots=1024, max_len=64, n=4, beams=SyntheticBeams(4))
    assert outcome.finished == len(lengths)


@pytest.mark.parametrize(("parents", "saved"), [([0, 1], 1 - 5 / 6), ([0, 0], 1 - 4 / 6)])
def test_recorded_beams_follow_the_recording(tmp_path, parents, saved):
    # Prompt and output of a block each, and a token in the third. Beams that go their own ways share the prompt's block;
    # two children of one beam share all but the block that they write to.
    path = tmp_path / "beams.json"
    path.write_text(json.dumps([{"width": 2, "requests": [[[0, 0], parents]]}]))
    use = MemoryUse(17, 18)
    assert serve("jpaged", [(16, 20)], slots=1024, n=2, beams=RecordedBeams(path, 2), observe=use).finished == 1
    assert use.means()["saved"] == pytest.approx(saved)


def test_a_recording_of_other_widths_is_refused(tmp_path):
    path = tmp_path / "beams.json"
    path.write_text(json.dumps([{"width": 2, "requests": [[[0, 0]]]}]))
    with pytest.raises(ValueError, match="width 3"):
        RecordedBeams(path, 3)


# ----------------------------------------------------------------------------------------------- memory and traces


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=20), st.sampled_from(SYSTEMS))
@settings(max_examples=60, deadline=None)
def test_every_request_ends_and_shares_of_the_pool_are_shares(lengths, system):
    use = MemoryUse(0, 1e9)
    outcome = serve(system, lengths, slots=512, max_len=256, ft_batch=3, observe=use)
    means = use.means()
    assert outcome.finished == len(lengths)
    assert 0 < means["tokens"] + means["reserved"] + means["internal"] <= 1
    assert means["reserved"] >= 0
    assert means["internal"] >= 0


def test_shares_of_a_lone_request():
    # 4 + 4 tokens under Max with 16 of 64 slots: after step k, 3 + k tokens are there, 8 - (3 + k) to come, 8 in excess.
    use = MemoryUse(0, 1e9)
    serve("orca-max", [(4, 4)], slots=64, block_size=4, max_len=16, observe=use)
    means = use.means()
    assert means["tokens"] == pytest.approx((4 + 5 + 6 + 7) / 4 / 64)
    assert means["reserved"] == pytest.approx((4 + 3 + 2 + 1) / 4 / 64)
    assert means["internal"] == pytest.approx(8 / 64)


def test_arrivals_are_poisson_and_requests_a_prefix_of_the_trace():
    pairs = np.stack([np.arange(1, 5001), np.full(5000, 7)], axis=1)
    drawn = list(traces.requests(pairs, 20, 200, seed=3))
    assert len(drawn) == pytest.approx(4000, rel=0.06)
    assert [r.arrival for r in drawn] == sorted(r.arrival for r in drawn)
    assert sorted(r.prompt for r in drawn) == list(range(1, len(drawn) + 1))


def test_chats_stay_in_their_halves():
    pairs = traces.chat_pairs(np.array([[300, 1500], [900, 10]]), 500)
    assert len(pairs) == 500
    assert pairs.max(axis=0).tolist() == [1024, 1016]
    assert pairs.min() >= 1


def test_swapping_costs_what_the_paper_measured():
    # Calibrated on blocks of 1 and 256; the sizes between are predictions.
    times = [1e3 * CostModel(MODELS["opt-13b"], block_size=size).swap(256) for size in BLOCK_SIZES]
    assert times == pytest.approx(FIG19A_SWAP, rel=0.06)


def test_capacity_is_where_latency_crosses_the_threshold():
    scenario = Scenario(system="jpaged", model="opt-13b", data="alpaca", rate=3.0, duration=1.0)
    found = capacity(scenario, lambda s: {"normalized_latency": 0.5 * (s.rate / 7) ** 8})
    assert found["capacity"] == pytest.approx(7, rel=1e-3)


# ------------------------------------------------------------------------------------------------- prefix cache


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=40), st.integers(1, 12))
def test_the_prefix_cache_finds_what_an_ideal_lru_finds(paths, num_blocks):
    # A block's id names all that stands before it, as the trace's do.
    names: dict[tuple[int, ...], int] = {}
    prompts = [
        [*(names.setdefault(tuple(path[: i + 1]), len(names)) for i in range(len(path))), -1]
        for path in paths
        if len(path) <= num_blocks
    ]
    assert through_cache(prompts, num_blocks) == through_lru(prompts, num_blocks)


# -------------------------------------------------------------------------------------------------------- command


def test_a_table_from_a_generated_trace(tmp_path):
    rng = np.random.default_rng(0)
    with gzip.open(tmp_path / traces.FILES["sharegpt"], "wt", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arrival_s", "prompt_tokens", "output_tokens"])
        writer.writerows(["", *pair] for pair in rng.integers(20, 200, (300, 2)).tolist())
    store = Store(tmp_path / "runs.json", tmp_path, processes=1)
    figure = FIGURES["fig2"]
    store.compute(figure.jobs(quick=True))
    rows = figure.rows(store, quick=True)
    assert json.loads((tmp_path / "runs.json").read_text())
    assert "| jpaged: tokens (%) | 96.3 |" in markdown(rows)
    ours = {row.what: row.ours for row in rows}
    batches = [ours[f"{s}: mean batch in overload"] for s in ("Orca (Max)", "Orca (Pow2)", "Orca (Oracle)", "jpaged")]
    assert batches == sorted(batches)
    again = Store(tmp_path / "runs.json", tmp_path)
    assert all(job in again for job in figure.jobs(quick=True))
