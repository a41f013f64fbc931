"""Sessions: whatever is done to a tree of them, each goes on as a request with its tokens would."""

import random

import pytest

from jpaged.errors import InvalidRequestError, JpagedError
from jpaged.sampling_params import BeamSearchParams, SamplingParams
from tests.engine.support import llm_of

PROMPT = {"prompt_token_ids": random.Random(1).sample(range(300), 30)}


def fresh(session, number):
    """The session's tokens as a prompt that finds nothing in the cache."""
    return {"prompt_token_ids": list(session.token_ids), "cache_salt": f"reference {number}"}


@pytest.mark.parametrize(("num_blocks", "caching"), [(512, True), (512, False), (70, True), (70, False)])
def test_a_tree_of_sessions_samples_what_requests_would(tiny, num_blocks, caching):
    llm = llm_of(tiny(num_blocks=num_blocks, enable_prefix_caching=caching))
    blocks, rng = llm.engine.blocks, random.Random(3)
    live = [llm.session(PROMPT)]
    for number in range(100):
        kind, session = rng.random(), rng.choice(live)
        if kind < 0.3 and len(live) < 40:
            live += session.fork(rng.randrange(1, 4))
        elif kind < 0.5 and len(session) < 150:
            session.append([rng.randrange(300) for _ in range(rng.randrange(1, 9))])
        elif kind < 0.75:
            chosen = [s for s in rng.sample(live, min(len(live), rng.randrange(1, 12))) if len(s) < 200]
            params = SamplingParams(max_tokens=rng.randrange(1, 9), seed=rng.randrange(99))
            if chosen:
                before = [list(s.token_ids) for s in chosen]
                expected = llm.generate([fresh(s, number) for s in chosen], params, use_tqdm=False)
                outputs = llm.sample(chosen, params)
                assert [o.token_ids for o in outputs] == [e.outputs[0].token_ids for e in expected]
                grown = [b + o.token_ids for b, o in zip(before, outputs, strict=True)]
                assert [s.token_ids for s in chosen] == grown
        elif kind < 0.85:
            session.truncate(rng.randrange(1, len(session) + 1))
        elif kind < 0.95:
            [one] = llm.generate(fresh(session, number), SamplingParams(temperature=0, max_tokens=1, logprobs=5))
            got, expected = session.logprobs(5), one.outputs[0].logprobs[0]
            assert list(got) == list(expected)
            assert [at.logprob for at in got.values()] == pytest.approx(
                [at.logprob for at in expected.values()], abs=1e-4
            )
        elif len(live) > 1:
            session.close()
            live.remove(session)
        blocks.check_invariants()
    assert blocks.num_copies > 2
    for session in live:
        session.close()
    assert blocks.num_used == 0


def test_thousands_of_branches_share_their_blocks(tiny):
    llm = llm_of(tiny(num_blocks=60))
    with llm.session(PROMPT) as root:
        root.logprobs(0)
        used = llm.engine.blocks.num_used
        branches = root.fork(3000)
        assert llm.engine.blocks.num_used == used == 8
        assert all(branch.num_computed_tokens == 30 for branch in branches)
        llm.engine.blocks.check_invariants()
        for branch in branches:
            branch.close()
    assert llm.engine.blocks.num_used == 0


def test_a_session_is_computed_once(tiny):
    llm = llm_of(tiny(enable_prefix_caching=False))
    session = llm.session(PROMPT)
    assert session.num_computed_tokens == 0
    output = session.sample(SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))
    assert session.token_ids == PROMPT["prompt_token_ids"] + output.token_ids
    assert session.num_computed_tokens == 34, "all but the last, which nobody has needed yet"
    [branch] = session.fork()
    branch.append([1, 2])
    steps = llm.engine.times.steps
    branch.sample(SamplingParams(max_tokens=1))
    assert llm.engine.times.steps == steps + 1, "three tokens to catch up with, in one step"
    session.truncate(10)
    assert (session.num_computed_tokens, branch.num_computed_tokens) == (10, 37)


def test_requests_come_before_parked_blocks(tiny):
    llm = llm_of(tiny(num_blocks=20, enable_prefix_caching=False))
    parked = llm.session(PROMPT)
    parked.logprobs(0)
    [output] = llm.generate({"prompt_token_ids": [7] * 60}, SamplingParams(max_tokens=8, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 8
    assert parked.num_computed_tokens == 0, "it gave way"
    assert len(parked.sample(SamplingParams(max_tokens=2, ignore_eos=True)).token_ids) == 2


def test_a_pinned_prefix_is_found_whatever_else_has_come_and_gone(tiny):
    llm = llm_of(tiny(num_blocks=24))
    prefix = llm.session(PROMPT)
    prefix.pin()
    assert prefix.num_computed_tokens == 28, "full blocks only"
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    for i in range(6):
        llm.generate({"prompt_token_ids": [i] * 50}, greedy)
    longer = {"prompt_token_ids": [*PROMPT["prompt_token_ids"], 5, 6]}
    [output] = llm.generate(longer, greedy)
    assert output.num_cached_tokens == 28
    with pytest.raises(InvalidRequestError, match="the whole pool has 16"):
        llm.generate({"prompt_token_ids": [1] * 66}, greedy)
    prefix.unpin()
    llm.generate({"prompt_token_ids": [1] * 66}, greedy)
    assert prefix.num_computed_tokens == 0


def test_pins_leave_room_for_what_waits_and_runs(tiny):
    engine = tiny(num_blocks=24)
    llm = llm_of(engine)
    prefix = llm.session(PROMPT)
    prefix.logprobs(0)
    engine.add_request("large", {"prompt_token_ids": [1] * 60}, SamplingParams(max_tokens=20))
    with pytest.raises(InvalidRequestError, match="a request may need 20"):
        prefix.pin()
    engine.abort("large")
    prefix.pin()


def test_beam_search_of_the_offline_api(tiny):
    """vLLM's names for what `use_beam_search` does; what else it gives is in test_beams.py."""
    llm = llm_of(tiny())
    for width, stopping in ((3, False), (2, "never")):
        asked = BeamSearchParams(beam_width=width, max_tokens=6, length_penalty=0.5, early_stopping=stopping)
        [output] = llm.beam_search(PROMPT, asked, use_tqdm=False)
        same = SamplingParams(
            n=width, use_beam_search=True, temperature=0, max_tokens=6, length_penalty=0.5, early_stopping=stopping
        )
        [expected] = llm.generate(PROMPT, same, use_tqdm=False)
        assert [o.token_ids for o in output.outputs] == [o.token_ids for o in expected.outputs]
        scores = [o.score for o in output.outputs]
        assert len(scores) == width
        assert scores == sorted(scores, reverse=True)
        for beam in output.outputs:
            assert beam.score == pytest.approx(beam.cumulative_logprob / len(beam.token_ids) ** 0.5)
    with pytest.raises(InvalidRequestError, match="temperature=0"):
        BeamSearchParams(beam_width=2, max_tokens=4, temperature=0.7).as_sampling_params()
    many = SamplingParams(n=40, use_beam_search=True, temperature=0, stop_token_ids=list(range(60)))
    with pytest.raises(InvalidRequestError, match="too many"):
        llm.generate(PROMPT, many)


def test_misuse_is_refused(tiny):
    llm = llm_of(tiny(num_blocks=60))
    session = llm.session(PROMPT)
    for params in (SamplingParams(n=2), SamplingParams(use_beam_search=True, temperature=0)):
        with pytest.raises(InvalidRequestError, match="one sequence"):
            session.sample(params)
    with pytest.raises(InvalidRequestError, match="given twice"):
        llm.sample([session, session])
    for length in (0, -1, 31):
        with pytest.raises(InvalidRequestError, match="can't be cut"):
            session.truncate(length)
    with pytest.raises(InvalidRequestError, match="vocabulary"):
        session.append([10**6])
    with pytest.raises(JpagedError, match="enable_prefix_caching"):
        llm_of(tiny(num_blocks=60, enable_prefix_caching=False)).session(PROMPT).pin()
    assert session.token_ids == PROMPT["prompt_token_ids"]
    session.close()
    session.close()
    with pytest.raises(InvalidRequestError, match="closed"):
        session.sample()
