"""Beam selection on the device against NumPy over all W x V continuations of each group."""

import types

import jax
import numpy as np
import pytest

from jpaged.runtime.beam_selection import num_members, pack_searches, packed_size, select, unpack_candidates
from jpaged.scheduling import Bucket, Variant

UNBORN = -1e9


def plan_of(groups, num_results, count):
    """As much of a StepPlan as there is to pack: (members, scores) of each group."""
    beams = [(types.SimpleNamespace(beams=types.SimpleNamespace(scores=s)), m) for m, s in groups]
    return types.SimpleNamespace(bucket=Bucket(num_results, 0), variant=Variant(num_beam_candidates=count), beams=beams)


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return (
        logits
        - logits.max(-1, keepdims=True)
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    )


def by_numpy(logits, members, scores, count):
    totals = (log_softmax(logits)[members] + scores[:, None].astype(np.float64)).reshape(-1)
    best = np.argsort(-totals, kind="stable")[:count]
    return totals[best], best // logits.shape[1], best % logits.shape[1]


def selected(logits, groups, count):
    packed = pack_searches(plan_of(groups, len(logits), count))
    assert packed.shape == (packed_size(len(logits), count),)
    return unpack_candidates(np.asarray(jax.jit(select, static_argnums=2)(logits, packed, count)))


@pytest.mark.parametrize("count", [2, 4, 8, 16])
@pytest.mark.parametrize("vocab", [5, 384, 1000])
def test_the_best_of_each_group(count, vocab):
    """Groups of different widths, their beams scattered over the results among sequences that do not search."""
    rng = np.random.default_rng(count * vocab)
    logits = rng.normal(0, 3, (24, vocab)).astype(np.float32)
    rows, groups = rng.permutation(24).tolist(), []
    for width in {1, num_members(count), max(1, num_members(count) - 1)}:
        members = [rows.pop() for _ in range(width)]
        groups.append((members, np.sort(rng.uniform(-20, 0, width)).astype(np.float32)[::-1]))
    found = selected(logits, groups, count)
    for i, (members, scores) in enumerate(groups):
        wanted = min(count, len(members) * vocab)
        values, parents, tokens = by_numpy(logits, members, scores, wanted)
        assert found.parents[i, :wanted].tolist() == parents.tolist()
        assert found.tokens[i, :wanted].tolist() == tokens.tolist()
        np.testing.assert_allclose(found.scores[i, :wanted], values, atol=1e-5)


def test_a_group_that_begins_is_continued_from_its_first_beam_alone():
    logits = np.repeat(np.random.default_rng(0).normal(0, 1, (1, 50)).astype(np.float32), 4, axis=0)
    found = selected(logits, [([0, 1, 2, 3], np.array([0, UNBORN, UNBORN, UNBORN], np.float32))], 8)
    assert found.parents[0].tolist() == [0] * 8
    assert found.tokens[0].tolist() == np.argsort(-logits[0], kind="stable")[:8].tolist()


def test_of_equal_continuations_the_better_beam_and_the_lower_token_come_first():
    found = selected(np.zeros((2, 3), np.float32), [([1, 0], np.zeros(2, np.float32))], 4)
    assert found.parents[0].tolist() == [0, 0, 0, 1]
    assert found.tokens[0].tolist() == [0, 1, 2, 0]


def test_masked_tokens_come_last():
    """allowed_token_ids leaves minus infinity elsewhere: no NaN comes of it."""
    logits = np.full((2, 10), -np.inf, np.float32)
    logits[:, [3, 7]] = [[1, 2], [2, 1]]
    found = selected(logits, [([0, 1], np.array([0, -0.1], np.float32))], 8)
    assert [tuple(x) for x in zip(found.parents[0, :4], found.tokens[0, :4], strict=True)] == [
        (0, 7),
        (1, 3),
        (0, 3),
        (1, 7),
    ]
    assert (found.scores[0, 4:] == -np.inf).all()


def test_who_does_not_search_packs_nothing():
    assert pack_searches(plan_of([], 7, 0)).shape == (0,) == (packed_size(7, 0),)


def test_pack_gives_each_result_its_score_and_each_group_its_members():
    packed = pack_searches(plan_of([([4, 2], np.array([-1, -2], np.float32)), ([0], np.array([-3], np.float32))], 5, 4))
    assert packed[:5].view(np.float32).tolist() == [-3, 0, -2, 0, -1]
    assert packed[5:].reshape(5, 2).tolist() == [[4, 2], [0, -1], [-1, -1], [-1, -1], [-1, -1]]
