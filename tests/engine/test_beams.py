"""Beam search through the whole engine equals Hugging Face's: tokens, order, scores and finish reasons, whatever else
runs in the batch, and however often the beams lose their blocks."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from jpaged import EngineConfig, SamplingParams
from tests.engine.support import GOLDENS, engine_factory, run


@dataclasses.dataclass(frozen=True)
class Search:
    """One of Hugging Face's beam searches: 4 beams, all of them returned."""

    prompt: list[int]
    params: SamplingParams
    tokens: list[list[int]]
    scores: list[float]

    def add(self, engine, request_id, *, priority=0, **changes):
        params = dataclasses.replace(self.params, **changes)
        engine.add_request(request_id, {"prompt_token_ids": self.prompt}, params, priority=priority)

    def check(self, output, num_return=4):
        assert [o.token_ids for o in output.outputs] == self.tokens[:num_return]
        assert [o.score for o in output.outputs] == pytest.approx(self.scores[:num_return], abs=1e-3)
        for index, completion in enumerate(output.outputs):
            assert completion.index == index
            penalty = len(completion.token_ids) ** self.params.length_penalty
            assert completion.cumulative_logprob == pytest.approx(completion.score * penalty, rel=1e-5)
            stopped = completion.token_ids[-1] in (
                *self.params.stop_token_ids,
                *([] if self.params.ignore_eos else [2]),
            )
            assert completion.finish_reason == ("stop" if stopped else "length")
            assert stopped or len(completion.token_ids) == self.params.max_tokens


def searches(family):
    """The four searches of a tiny model's reference file, by name."""
    reference = np.load(GOLDENS / "models" / family / "reference.npz")
    found = {}
    for prompt in ("p0", "p1"):
        for name, stop in (("beam", []), ("beameos", [int(reference[f"{prompt}_beameos_eos_id"])])):
            ids, lengths, scores = (reference[f"{prompt}_{name}_{part}"] for part in ("ids", "lengths", "scores"))
            found[f"{prompt} {name}"] = Search(
                reference[f"{prompt}_input_ids"].tolist(),
                SamplingParams(
                    n=4, use_beam_search=True, temperature=0, max_tokens=24, ignore_eos=True, stop_token_ids=stop
                ),
                [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)],
                scores.tolist(),
            )
    return found


LLAMA, MISTRAL = searches("llama"), searches("mistral")


@pytest.fixture(scope="session")
def tiny_mistral():
    return engine_factory(
        EngineConfig(
            model=str(GOLDENS / "models" / "mistral"),
            max_num_seqs=8,
            max_model_len=128,
            prefill_tile_size=16,
            block_size=4,
            num_gpu_blocks_override=128,
            max_num_batched_tokens=72,
            warmup=False,
        )
    )


def test_the_goldens_have_beams_that_end_early():
    for family in (LLAMA, MISTRAL):
        lengths = {name: [len(tokens) for tokens in search.tokens] for name, search in family.items()}
        assert lengths["p0 beam"] == lengths["p1 beam"] == [24] * 4
        assert min(lengths["p0 beameos"] + lengths["p1 beameos"]) < 24


@pytest.mark.parametrize("name", LLAMA)
def test_alone(tiny, tiny_mistral, name):
    for make, search in ((tiny, LLAMA[name]), (tiny_mistral, MISTRAL[name])):
        engine = make()
        search.add(engine, "only")
        search.check(run(engine)["only"])


PROMPT = [5 + (11 * i) % 370 for i in range(30)]
OTHERS = {
    "greedy": SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
    "sampling": SamplingParams(seed=3, top_p=0.9, max_tokens=30, ignore_eos=True),
    "parallel": SamplingParams(seed=4, n=2, max_tokens=12, ignore_eos=True),
    "best of": SamplingParams(seed=5, n=1, best_of=3, max_tokens=10, ignore_eos=True),
}


def tokens_of(output):
    return [completion.token_ids for completion in output.outputs]


@pytest.fixture(scope="session")
def others_alone(tiny):
    """What the other requests of the mixed batches give without company."""
    alone = {}
    for name, params in OTHERS.items():
        engine = tiny(enable_prefix_caching=False)
        engine.add_request(name, {"prompt_token_ids": PROMPT}, params)
        alone[name] = tokens_of(run(engine)[name])
    return alone


def add_mixed(engine, copies=1):
    """Eight rows hold one search and the first three others, or the last of these and a search."""
    for i in range(copies):
        for name in ("p0 beam", *OTHERS, "p0 beameos", "p1 beam", "p1 beameos"):
            if name in LLAMA:
                LLAMA[name].add(engine, f"{name} {i}")
            else:
                engine.add_request(f"{name} {i}", {"prompt_token_ids": PROMPT}, OTHERS[name])


def check_mixed(finished, others_alone, copies=1):
    for i in range(copies):
        for name, search in LLAMA.items():
            search.check(finished[f"{name} {i}"])
        for name, alone in others_alone.items():
            assert tokens_of(finished[f"{name} {i}"]) == alone


def test_mixed_with_everything_else(tiny, others_alone):
    engine = tiny()
    add_mixed(engine)
    kinds = set()

    def look(step):
        if engine._in_flight:
            plan = engine._in_flight[-1].plan
            groups = {sequence.group for sequence in plan.sampling}
            searching, greedy = any(g.beams for g in groups), any(g.params.greedy and not g.beams for g in groups)
            drawing, many = any(not g.params.greedy for g in groups), any(g.params.n == 2 for g in groups)
            kinds.add((searching, greedy, drawing, many))

    finished = run(engine, after_step=look)
    assert (True, True, True, True) in kinds, "one step has greedy, sampled, parallel and beam sequences"
    check_mixed(finished, others_alone)


# --------------------------------------------------------------------------------------------- pressure

MODES = {
    "swap": {"swap_blocks": 200, "preemption_mode": "swap"},
    "auto": {"swap_blocks": 200},
    "recompute": {"swap_blocks": 200, "preemption_mode": "recompute"},
    "no host room": {"swap_blocks": 0},
    "little host room": {"swap_blocks": 16},
}


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_beams_that_lose_their_blocks_again_and_again(tiny, mode, caching):
    """A pool that holds two searches, and ever new requests of higher priority that want blocks, too."""
    engine = tiny(num_blocks=40, scheduling_policy="priority", enable_prefix_caching=caching, **MODES[mode])
    for name, search in LLAMA.items():
        for i in range(2):
            search.add(engine, f"{name} {i}", priority=1)

    def add_another(step):
        if step % 4 == 0 and step < 160:
            prompt = {"prompt_token_ids": [5 + step] * 24}
            engine.add_request(f"{step}", prompt, SamplingParams(seed=step, max_tokens=10, ignore_eos=True))

    finished = run(engine, after_step=add_another)
    preemptions = 0
    for name, search in LLAMA.items():
        for i in range(2):
            search.check(finished[f"{name} {i}"])
            preemptions += finished[f"{name} {i}"].metrics.num_preemptions
    scheduler = engine.scheduler
    assert preemptions >= 6
    assert scheduler.num_swaps_in == scheduler.num_swaps_out
    if mode in ("swap", "auto"):
        assert scheduler.num_swaps_in >= 6
    elif mode == "little host room":
        assert 0 < scheduler.num_swaps_out < preemptions, "some fit into host memory, some had to be computed anew"
    else:
        assert scheduler.num_swaps_out == 0


# ------------------------------------------------------------------------------- what is returned of a search


@pytest.mark.parametrize("n", [1, 2, 3])
def test_fewer_outputs_than_beams_are_the_first_ones(tiny, n):
    engine = tiny()
    for name, search in LLAMA.items():
        search.add(engine, name, n=n, best_of=4)
    finished = run(engine)
    for name, search in LLAMA.items():
        search.check(finished[name], num_return=n)


@pytest.mark.parametrize("num_blocks", [512, 40])
def test_logprobs_are_those_of_the_tokens_of_each_beam(tiny, num_blocks):
    """Their sum is the cumulative log-probability; and each is what the output has as part of a prompt."""
    engine = tiny(num_blocks=num_blocks, swap_blocks=100, enable_prefix_caching=False)
    for name, search in LLAMA.items():
        search.add(engine, name, logprobs=3)
    finished = run(engine)
    for name, search in LLAMA.items():
        search.check(finished[name])
        for i, completion in enumerate(finished[name].outputs):
            text = {"prompt_token_ids": search.prompt + completion.token_ids}
            engine.add_request(f"{name} {i}", text, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=3))
    scored = run(engine)
    for name, search in LLAMA.items():
        for i, completion in enumerate(finished[name].outputs):
            chosen = [at[token] for at, token in zip(completion.logprobs, completion.token_ids, strict=True)]
            assert sum(at.logprob for at in chosen) == pytest.approx(completion.cumulative_logprob, abs=1e-4)
            expected = scored[f"{name} {i}"].prompt_logprobs[len(search.prompt) :]
            for at, again in zip(completion.logprobs, expected, strict=True):
                assert {t: x.logprob for t, x in at.items()} == pytest.approx(
                    {t: x.logprob for t, x in again.items()}, abs=1e-3
                )
                assert all(x.rank in (None, again[t].rank) for t, x in at.items())
                assert [x.rank for x in at.values()][1:] == sorted(x.rank for x in list(at.values())[1:])


def test_only_the_last_output_of_a_search_is_returned(tiny):
    """What the beams hold on the way may be gone in the next step."""
    engine = tiny()
    LLAMA["p1 beam"].add(engine, "only")
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert [output.finished for output in outputs] == [True]


# ---------------------------------------------------------------------------------------------------- aborts


@pytest.mark.parametrize("when", [1, 2, 3, 9, 20])
def test_an_aborted_search_returns_the_best_so_far_and_hurts_nobody(tiny, when):
    engine = tiny()
    victim, other = LLAMA["p1 beam"], LLAMA["p0 beameos"]
    victim.add(engine, "victim")
    other.add(engine, "other")

    def abort(step):
        if step == when:
            engine.abort("victim")

    finished = run(engine, after_step=abort)
    other.check(finished["other"])
    aborted = finished["victim"].outputs
    assert {o.finish_reason for o in aborted} == {"abort"}
    assert 1 <= len(aborted) <= 4
    # 41 tokens of prompt are one step; a beam search is committed in the step after the one that launched it.
    assert [len(o.token_ids) for o in aborted] == [when] * 4, "beams advance together"
    assert len({tuple(o.token_ids) for o in aborted}) == 4
    assert [o.score for o in aborted] == sorted((o.score for o in aborted), reverse=True)


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_abort_of_searches_without_blocks(tiny, mode):
    """One is swapped out, or waits to be computed anew, when it is aborted."""
    engine = tiny(num_blocks=40, enable_prefix_caching=False, preemption_mode=mode, swap_blocks=100)
    first, second = LLAMA["p1 beam"], LLAMA["p1 beameos"]
    first.add(engine, "first")
    second.add(engine, "second")
    state = []

    def abort(step):
        if engine.scheduler.num_preemptions and not state:
            state.append((engine.scheduler.num_swapped, engine.scheduler.num_waiting))
            engine.abort("second")
            assert engine.scheduler.swap_space.num_used == 0

    finished = run(engine, after_step=abort)
    assert state == [(1, 0) if mode == "swap" else (0, 1)]
    first.check(finished["first"])
    aborted = finished["second"].outputs
    assert all(o.finish_reason in ("abort", "stop") for o in aborted)
    assert all(o.token_ids for o in aborted)


# ------------------------------------------------------------------------------------------------ interrupts


def run_interrupted(engine, monkeypatch, when):
    """Runs to the end; the launches of the steps `when` fail, as by Ctrl-C."""
    forward, count = type(engine.runner).forward, itertools.count()

    def interrupted(runner, plan):
        if next(count) in when:
            raise KeyboardInterrupt
        return forward(runner, plan)

    finished = {}
    with monkeypatch.context() as patch:
        patch.setattr(type(engine.runner), "forward", interrupted)
        while engine.has_unfinished_requests():
            try:
                finished |= {output.request_id: output for output in engine.step() if output.finished}
            except KeyboardInterrupt:
                engine.blocks.check_invariants()
    return finished


@pytest.mark.parametrize("num_blocks", [512, 40])
def test_steps_that_fail_lose_nothing(tiny, monkeypatch, num_blocks):
    """Whatever such a step was to swap, to copy or to tell the device: the beams are computed anew."""
    engine = tiny(num_blocks=num_blocks, swap_blocks=100)
    for name, search in LLAMA.items():
        search.add(engine, name)
    finished = run_interrupted(engine, monkeypatch, {0, 1, 2, 5, 9, 10, 21, 30, 40, 43, 44})
    for name, search in LLAMA.items():
        search.check(finished[name])
    assert sum(output.metrics.num_preemptions for output in finished.values()) >= 15


@pytest.mark.parametrize("length", [7, 8])
def test_beams_with_equal_tokens(tiny, monkeypatch, length):
    """Two tokens are allowed: there are four beams after the first token, and only two of them differ."""
    params = dataclasses.replace(LLAMA["p0 beam"].params, allowed_token_ids=[30, 80], max_tokens=6)
    prompt = {"prompt_token_ids": PROMPT[:length]}
    outputs = []
    for when in (set(), {1}, {2}, {1, 3}, {1, 2, 3, 4}):
        engine = tiny()
        engine.add_request("only", prompt, params)
        outputs.append(run_interrupted(engine, monkeypatch, when)["only"].outputs)
        assert [o.token_ids for o in outputs[-1]] == [o.token_ids for o in outputs[0]]
        assert [o.score for o in outputs[-1]] == pytest.approx([o.score for o in outputs[0]], abs=1e-4)
    assert len({tuple(o.token_ids) for o in outputs[0]}) == 4


# ------------------------------------------------------------------------------------------------ the real model


def real_searches():
    """Hugging Face's plain searches of five chats; the other rules for ending are the host's: test_beam_search.py."""
    for golden in json.loads((GOLDENS / "smollm2_beams.json").read_text()):
        options = {name: golden[name] for name in ("early_stopping", "length_penalty")}
        if options == {"early_stopping": False, "length_penalty": 1.0}:
            params = SamplingParams(n=4, use_beam_search=True, temperature=0, max_tokens=64, **options)
            yield Search(golden["prompt_token_ids"], params, golden["output_token_ids"], golden["scores"])


def test_smollm2_chats(smollm2):
    """Five searches and two greedy chats, in a pool that just holds the longest of the searches."""
    engine = smollm2(num_blocks=39, enable_prefix_caching=False, swap_blocks=200)
    searches = list(real_searches())
    assert len(searches) == 5
    for i, search in enumerate(searches):
        search.add(engine, f"search {i}")
    chats = json.loads((GOLDENS / "smollm2_chats.json").read_text())[:2]
    for i, chat in enumerate(chats):
        greedy = SamplingParams(temperature=0, max_tokens=48)
        engine.add_request(f"chat {i}", {"prompt_token_ids": chat["prompt_token_ids"]}, greedy)
    finished = run(engine)
    for i, search in enumerate(searches):
        search.check(finished[f"search {i}"])
    for i, chat in enumerate(chats):
        assert finished[f"chat {i}"].outputs[0].token_ids == chat["output_token_ids"]
    assert engine.scheduler.num_swaps_in > 0
