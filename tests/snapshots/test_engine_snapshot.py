"""LLMEngine.snapshot and restore: wherever requests are, another engine ends them as they would have ended."""

import dataclasses

import numpy as np
import pytest
from pydantic import TypeAdapter
from pydantic_core import to_json

from jpaged import RequestOutputKind, SamplingParams, StructuredOutputsParams
from jpaged.errors import EngineDeadError, SnapshotError
from jpaged.scheduling.ngrams import NgramSpeculator
from jpaged.sequence import Status
from jpaged.snapshots import Snapshot
from tests.engine.support import run

LONG = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
CHOICE = StructuredOutputsParams(regex=r"[a-z]{3,9} [0-9]{4}")


def prompt(index, length=9):
    return {"prompt_token_ids": [5 + (7 * index + 3 * j) % 370 for j in range(length)]}


def requests():
    """(prompt, params) of every kind."""
    drawn = SamplingParams(temperature=0.9, max_tokens=30, ignore_eos=True)
    yield prompt(0), LONG
    yield prompt(1), drawn  # its seed is the engine's
    yield prompt(2, 70), dataclasses.replace(drawn, seed=7, frequency_penalty=0.5, repetition_penalty=1.2)
    yield prompt(3), dataclasses.replace(drawn, n=3, logprobs=2, max_tokens=20)
    yield prompt(4), dataclasses.replace(drawn, n=1, best_of=2, seed=3)
    yield prompt(5), SamplingParams(temperature=0, n=3, use_beam_search=True, max_tokens=16, logprobs=3)
    yield prompt(6), SamplingParams(temperature=0.8, max_tokens=24, structured_outputs=CHOICE)
    yield prompt(7, 40), dataclasses.replace(drawn, prompt_logprobs=1, logprobs=0)
    yield "Once upon a time", dataclasses.replace(drawn, stop=["e"], n=2, include_stop_str_in_output=True)
    yield (
        prompt(10),
        SamplingParams(temperature=0, n=2, best_of=3, use_beam_search=True, max_tokens=20, stop=["e", "an"]),
    )
    yield prompt(11), SamplingParams(temperature=0, n=2, use_beam_search=True, max_tokens=20, structured_outputs=CHOICE)
    yield prompt(9), dataclasses.replace(drawn, min_tokens=5, logit_bias={9: 4.0}, bad_words=["a"], max_tokens=9)


def fill(engine):
    for i, (text, params) in enumerate(requests()):
        engine.add_request(str(i), text, params)


def through_json(snapshot):
    """What a file would keep of it."""
    return TypeAdapter(Snapshot).validate_json(to_json(snapshot, inf_nan_mode="constants"))


def interrupted(make, steps, finished, again=None, fill=fill):
    """Steps an engine so often, then lets another one go on; returns all that both have finished."""
    first = make()
    fill(first)
    for _ in range(steps):
        if not first.has_unfinished_requests():
            break
        finished |= {output.request_id: output for output in first.step() if output.finished}
    statuses = {group.status for group in first.scheduler.roster.unfinished}
    snapshot = through_json(first.snapshot())
    first.abort_all()
    run(first)
    second = make()
    second.restore(snapshot)
    if again is not None:  # a restart while the requests of the first are on their way
        for _ in range(again):
            finished |= {output.request_id: output for output in second.step() if output.finished}
        snapshot = through_json(second.snapshot())
        second.abort_all()
        run(second)
        second = make()
        second.restore(snapshot)
    finished |= run(second)
    return finished, statuses


def check(got, want):
    assert got.keys() == want.keys()
    for request_id, output in want.items():
        pairs = list(zip(got[request_id].outputs, output.outputs, strict=True))
        for mine, theirs in pairs:
            assert (mine.token_ids, mine.text) == (theirs.token_ids, theirs.text), request_id
            assert (mine.finish_reason, mine.stop_reason) == (theirs.finish_reason, theirs.stop_reason)
            assert mine.score == pytest.approx(theirs.score, abs=1e-3)
            assert (mine.logprobs is None) == (theirs.logprobs is None)
            for at, other in zip(mine.logprobs or [], theirs.logprobs or [], strict=True):
                assert at.keys() == other.keys()
                assert [one.logprob for one in at.values()] == pytest.approx(
                    [o.logprob for o in other.values()], abs=1e-3
                )
        mine, theirs = got[request_id].prompt_logprobs, output.prompt_logprobs
        assert (mine is None) == (theirs is None)
        assert [at and list(at) for at in mine or []] == [at and list(at) for at in theirs or []]


@pytest.fixture(scope="module")
def undisturbed(tiny):
    engine = tiny(enable_prefix_caching=False)
    fill(engine)
    return run(engine)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 8, 13, 21, 34])
def test_another_engine_ends_what_one_began(tiny, undisturbed, steps):
    got, _ = interrupted(lambda: tiny(enable_prefix_caching=False), steps, {})
    check(got, undisturbed)


def test_in_every_state(tiny, undisturbed):
    """A pool so small that groups wait, are computed again and are swapped out; and two restarts."""
    seen = set()
    for steps in range(4, 44, 4):
        got, statuses = interrupted(
            lambda: tiny(num_blocks=64, enable_prefix_caching=False, swap_blocks=64, max_num_batched_tokens=40),
            steps,
            {},
            again=5,
        )
        check(got, undisturbed)
        seen |= statuses
    assert seen == {Status.WAITING, Status.RUNNING, Status.SWAPPED}


@pytest.mark.parametrize("steps", [6, 20])
def test_engines_that_guess_end_it_alike(tiny, steps):
    """Requests that leave lanes to spare, and may draw two tokens only, so that a guess is often right."""
    speculators = []

    def fill(engine):
        for seed in range(3):
            params = SamplingParams(seed=seed, max_tokens=60, allowed_token_ids=[30, 80], ignore_eos=True, logprobs=1)
            engine.add_request(str(seed), {"prompt_token_ids": [7, 30, 80] * 9}, params)

    undisturbed = tiny(enable_prefix_caching=False)
    fill(undisturbed)

    def guessing():
        speculators.append(NgramSpeculator(4, longest=3, shortest=1))
        return tiny(enable_prefix_caching=False, speculator=speculators[-1])

    got, _ = interrupted(guessing, steps, {}, again=3, fill=fill)
    check(got, run(undisturbed))
    assert all(speculator.num_guessed for speculator in speculators)


def test_a_snapshot_changes_nothing_and_picks_requests(tiny, undisturbed):
    engine = tiny(enable_prefix_caching=False)
    fill(engine)
    finished = {}
    while engine.has_unfinished_requests():
        finished |= {output.request_id: output for output in engine.step() if output.finished}
        engine.snapshot()
        picked = engine.snapshot(["3", "unknown"])
        assert [record.request_id for record in picked.requests] == (["3"] if "3" not in finished else [])
    check(finished, undisturbed)


def test_requests_that_come_later_draw_other_seeds_and_wait_behind(tiny):
    first = tiny(enable_prefix_caching=False)
    first.add_request("a", prompt(0), LONG)
    first.add_request("b", prompt(1), LONG)
    snapshot = first.snapshot()
    first.abort_all()
    run(first)
    second = tiny(enable_prefix_caching=False)
    second.restore(snapshot)
    second.add_request("c", prompt(2), LONG)
    a, b, c = second.scheduler.roster.waiting
    assert [group.request_id for group in (a, b, c)] == ["a", "b", "c"]
    assert len({group.seed for group in (a, b, c)}) == 3
    assert a.metrics.arrival_time <= c.metrics.arrival_time, "arrivals are on this process's clock"
    second.abort_all()
    run(second)


def test_the_first_delta_begins_with_the_first_token(tiny):
    params = dataclasses.replace(LONG, output_kind=RequestOutputKind.DELTA)
    first, second = tiny(enable_prefix_caching=False), tiny(enable_prefix_caching=False)
    first.add_request("a", prompt(0), params)
    parts = [output.outputs[0].token_ids for _ in range(9) for output in first.step()]
    second.restore(first.snapshot())
    first.abort_all()
    run(first)
    outputs = []
    while second.has_unfinished_requests():
        outputs += second.step()
    tokens = [token for output in outputs for token in output.outputs[0].token_ids]
    assert len(tokens) == 40
    assert tokens[: sum(map(len, parts))] == [token for part in parts for token in part]


def test_what_does_not_fit_is_refused_and_nothing_is_restored(tiny):
    first = tiny(enable_prefix_caching=False)
    first.add_request("small", prompt(0), LONG)
    first.add_request("large", prompt(1, 100), LONG)
    snapshot = first.snapshot()
    first.abort_all()
    run(first)
    second = tiny(num_blocks=20, enable_prefix_caching=False)
    with pytest.raises(SnapshotError, match=r"'large'.*can't go on here.*blocks"):
        second.restore(snapshot)
    assert not second.has_unfinished_requests()
    assert not second.scheduler.has_work
    third = tiny(enable_prefix_caching=False)
    [record, _] = snapshot.requests
    with pytest.raises(SnapshotError, match="max_model_len is 256"):
        third.restore(dataclasses.replace(snapshot, requests=[dataclasses.replace(record, max_length=999)]))
    third.restore(snapshot)
    with pytest.raises(SnapshotError, match="names of unfinished"):
        third.restore(snapshot)
    third.abort_all()
    run(third)


def test_another_model_is_refused(tiny, monkeypatch):
    first, second = tiny(), tiny()
    assert first.fingerprint == second.fingerprint
    other = dataclasses.replace(first.snapshot(), fingerprint="another")
    with pytest.raises(SnapshotError, match="another model"):
        second.restore(other)


def test_the_fingerprint_knows_weights_and_configuration(tiny):
    from jpaged.snapshots import fingerprint

    engine = tiny()
    params, config = engine.params, engine.model_config
    trained = {**params, "norm": {"scale": np.asarray(params["norm"]["scale"]) + 1e-3}}
    other = dataclasses.replace(config, norm_eps=config.norm_eps * 2)
    assert len({fingerprint(config, params), fingerprint(config, trained), fingerprint(other, params)}) == 3
    assert fingerprint(config, params) == engine.fingerprint


def test_a_dead_engine_restores_nothing(tiny, monkeypatch):
    engine = tiny(enable_prefix_caching=False)
    engine.add_request("a", prompt(0), LONG)
    snapshot = engine.snapshot()

    def broken(plan):
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "forward", broken)
        with pytest.raises(EngineDeadError):
            engine.step()
    with pytest.raises(EngineDeadError):
        engine.restore(snapshot)
