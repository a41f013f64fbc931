"""BeamSearch against Hugging Face's beam search: tokens, order, scores and the step at which it ends.

llama_beams.json       a grid of parameters, with the candidates of each step: exact, no model runs
models/*/reference.npz  and the grid again, with candidates from jpaged's own dense forward pass
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import checkpoints
from jpaged.models.registry import build
from jpaged.scheduling.beam_search import BeamSearch, Node, path
from tests.engine.support import GOLDENS

GRID = json.loads((GOLDENS / "llama_beams.json").read_text())
PROMPT = GRID["prompt_token_ids"]
NAMES = [f"{s['width']} beams, eos {s['eos_token_ids']}" for s in GRID["searches"]]


@dataclasses.dataclass
class Case:
    """One search of Hugging Face's: its parameters and its `width` best hypotheses."""

    width: int
    eos: frozenset[int]
    max_tokens: int
    length_penalty: float
    early_stopping: bool | str
    steps: int
    tokens: list[list[int]]
    scores: list[float]

    def beams(self, num_return=None):
        return BeamSearch(
            self.width,
            num_return or self.width,
            len(PROMPT),
            len(PROMPT) + self.max_tokens,
            self.length_penalty,
            self.early_stopping,
            self.eos,
        )


def cases(search):
    for *parameters, beams, scores in search["cases"]:
        tokens = [GRID["sequences"][i] for i in beams]
        yield Case(search["width"], frozenset(search["eos_token_ids"]), *parameters, tokens, scores)


def arrays(candidates):
    scores, parents, tokens = candidates
    return np.array(scores, np.float32), np.array(parents, np.int32), np.array(tokens, np.int32)


def check_reasons(hypotheses, eos, max_tokens):
    for hypothesis in hypotheses:
        tokens = hypothesis.token_ids
        assert hypothesis.finish_reason == ("stop" if tokens[-1] in eos else "length")
        assert len(tokens) == max_tokens or tokens[-1] in eos
        assert not eos.intersection(tokens[:-1])


@pytest.mark.parametrize("search", GRID["searches"], ids=NAMES)
def test_every_case_of_the_grid_is_exact(search):
    """From the same candidates: the same tokens in the same order, scores equal in every bit, the same last step."""
    for case in cases(search):
        beams = case.beams()
        assert beams.num_candidates == len(search["candidates"][0][0])
        for candidates in search["candidates"][: case.steps]:
            assert not beams.done
            beams.advance(*arrays(candidates))
        assert beams.done
        best = beams.best()
        assert [h.token_ids for h in best] == case.tokens
        assert [np.float32(h.score) for h in best] == [np.float32(s) for s in case.scores]
        for h in best:
            assert h.score == pytest.approx(h.cumulative_logprob / len(h.token_ids) ** case.length_penalty, rel=1e-6)
        check_reasons(best, case.eos, case.max_tokens)


def test_the_grid_has_what_it_is_for():
    """Searches that end before the limit, by each rule; hypotheses of many lengths; results that the rules change."""
    all_cases = [case for search in GRID["searches"] for case in cases(search) if case.max_tokens == 20]
    for early_stopping in (True, False, "never"):
        assert sum(c.steps < 20 for c in all_cases if c.early_stopping == early_stopping) >= 10
    assert len({len(tokens) for case in all_cases for tokens in case.tokens}) >= 10
    assert any(len({len(tokens) for tokens in case.tokens}) >= 5 for case in all_cases)
    results = {}
    for case in all_cases:
        results.setdefault((case.width, case.eos), set()).add(str(case.tokens))
    assert max(map(len, results.values())) >= 8


@pytest.mark.parametrize("num_return", [1, 2, 3, 4])
def test_fewer_hypotheses_are_the_first_ones(num_return):
    search = next(s for s in GRID["searches"] if s["width"] == 4 and len(s["eos_token_ids"]) == 2)
    for case in cases(search):
        beams = case.beams(num_return)
        for candidates in search["candidates"][: case.steps]:
            assert not beams.done  # the search is as wide and as long, whatever is returned of it
            beams.advance(*arrays(candidates))
        assert beams.done
        assert [h.token_ids for h in beams.best()] == case.tokens[:num_return]


class DenseModel:
    """Log-probabilities of the next token by the training forward pass over whole sequences, each computed once."""

    ROWS, LENGTH = 8, 72

    def __init__(self, family):
        folder = GOLDENS / "models" / family
        checkpoint = checkpoints.load(folder, skip_tokenizer=True)
        model = build(checkpoint.config, jnp.float32)
        self.reference = np.load(folder / "reference.npz")
        self._known = {}

        def forward(params, tokens, lengths):
            logits = model.apply({"params": params}, tokens, method="forward_logits")
            return jax.nn.log_softmax(logits[jnp.arange(self.ROWS), lengths - 1])

        self._forward = jax.jit(lambda tokens, lengths: forward(checkpoint.params, tokens, lengths))

    def log_probs(self, sequences):
        """float32 [sequences, vocab]"""
        sequences = [tuple(s) for s in sequences]
        missing = [s for s in dict.fromkeys(sequences) if s not in self._known]
        if missing:
            tokens = np.zeros((self.ROWS, self.LENGTH), np.int32)
            lengths = np.ones(self.ROWS, np.int32)
            for row, sequence in enumerate(missing):
                tokens[row, : len(sequence)] = sequence
                lengths[row] = len(sequence)
            self._known.update(zip(missing, np.asarray(self._forward(tokens, lengths)), strict=False))
        return np.stack([self._known[s] for s in sequences])

    def search(self, prompt, beams):
        while not beams.done:
            log_probs = self.log_probs([*prompt, *(n.token for n in path(node))] for node in beams.nodes)
            total = (beams.scores[:, None] + log_probs).ravel()
            top = np.argsort(-total, kind="stable")[: beams.num_candidates]
            parents, tokens = np.divmod(top, log_probs.shape[1])
            choices = beams.advance(total[top], parents, tokens)
            assert [n.token for n in beams.nodes] == [token for _, token in choices]
            assert (np.diff(beams.scores) <= 0).all()
        return beams.best()


dense_model = functools.cache(DenseModel)


@pytest.mark.parametrize("search", GRID["searches"], ids=NAMES)
def test_dense_forward_over_the_grid(search):
    for case in cases(search):
        beams = case.beams()
        best = dense_model("llama").search(PROMPT, beams)
        assert beams.num_generated == case.steps
        assert [h.token_ids for h in best] == case.tokens
        np.testing.assert_allclose([h.score for h in best], case.scores, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("prompt", ["p0", "p1"])
@pytest.mark.parametrize("kind", ["beam", "beameos"])
def test_dense_forward_against_the_reference_files(family, prompt, kind):
    """Made with 4 beams, 24 tokens, length_penalty 1 and early_stopping False."""
    model = dense_model(family)
    expected = {name: model.reference[f"{prompt}_{kind}_{name}"] for name in ("ids", "lengths", "scores")}
    ids = model.reference[f"{prompt}_input_ids"].tolist()
    eos = frozenset({int(model.reference[f"{prompt}_beameos_eos_id"])} if kind == "beameos" else ())
    beams = BeamSearch(4, 4, len(ids), len(ids) + 24, 1.0, False, eos)
    best = model.search(ids, beams)
    assert [h.token_ids for h in best] == [
        row[:n].tolist() for row, n in zip(expected["ids"], expected["lengths"], strict=True)
    ]
    np.testing.assert_allclose([h.score for h in best], expected["scores"], atol=1e-5)
    check_reasons(best, eos, 24)


# ------------------------------------------------------------------------------------------------ by hand


EOS = 0


def step(beams, *candidates, logprobs=None):
    """(score, parent, token) of each candidate."""
    scores, parents, tokens = zip(*candidates, strict=True)
    return beams.advance(*arrays((scores, parents, tokens)), logprobs)


def small(early_stopping=False, length_penalty=1.0, max_tokens=10, num_return=2):
    return BeamSearch(2, num_return, 5, 5 + max_tokens, length_penalty, early_stopping, frozenset({EOS}))


def test_a_fork_shares_the_nodes_before_it():
    beams = small()
    assert beams.scores.tolist() == [0, -1e9]
    assert beams.best() == []
    assert step(beams, (-1, 0, 7), (-2, 0, 8), (-3, 0, 9), (-4, 0, 6)) == [(0, 7), (0, 8)]
    first = beams.nodes[0]
    choices = step(beams, (-1.5, 0, 3), (-2.5, 0, 4), (-3, 1, 5), (-4, 1, 5), logprobs=["a", "b", "c", "d"])
    assert choices == [(0, 3), (0, 4)]
    assert [node.parent for node in beams.nodes] == [first, first]
    assert beams.scores.tolist() == [-1.5, -2.5]
    one, two = beams.best()
    assert (one.token_ids, one.logprobs, one.finish_reason) == ([7, 3], [None, "a"], None)
    assert (two.token_ids, two.score, two.cumulative_logprob) == ([7, 4], -1.25, -2.5)


def test_only_the_first_width_candidates_finish():
    """An end-of-sequence token below them is dropped: it neither finishes nor goes on."""
    beams = small()
    step(beams, (-1, 0, 7), (-2, 0, 8), (-3, 0, EOS), (-4, 0, 6))
    assert beams.finished == []
    assert step(beams, (-2, 0, EOS), (-2.5, 0, 9), (-3, 1, EOS), (-4, 1, 9)) == [(0, 9), (1, 9)]
    assert [h.token_ids for h in beams.finished] == [[7, EOS]]


def test_a_better_hypothesis_replaces_a_finished_one_and_of_equal_ones_the_earlier_stays():
    beams = small("never", length_penalty=0.0)
    step(beams, (-2, 0, EOS), (-2.5, 0, 8), (-3, 0, 9), (-4, 0, 6))
    step(beams, (-3, 0, EOS), (-3.5, 1, 8), (-4, 0, 9), (-5, 0, 6))
    step(beams, (-3, 0, EOS), (-3.25, 1, 8), (-4, 0, 9), (-5, 0, 6))
    assert [h.token_ids for h in beams.finished] == [[EOS], [8, EOS]]
    assert beams.done  # at no penalty a beam of -3.25 cannot reach -3


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "done"),
    [
        (True, 1.0, True),  # two have finished
        (False, 1.0, False),  # -2 / 2 is above -2.1 / 2
        (False, 0.0, False),
        ("never", 1.0, False),
        ("never", -1.0, False),
    ],
)
def test_when_a_running_beam_is_better_than_the_worst_finished(early_stopping, length_penalty, done):
    beams = small(early_stopping, length_penalty)
    step(beams, (-1, 0, 7), (-1.5, 0, 8), (-3, 0, 9), (-4, 0, 6))
    step(beams, (-1.9, 0, EOS), (-2.1, 1, EOS), (-2.0, 0, 9), (-4, 0, 6))
    assert beams.done == done


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "done"),
    [
        (True, 1.0, True),
        (False, 1.0, True),  # -4 / 2 is below -2 / 2
        (False, -1.0, True),
        ("never", 0.0, True),
        ("never", -1.0, True),  # longer is worse
        ("never", 1.0, False),  # -4 / 10 would be better
    ],
)
def test_when_a_running_beam_is_worse_than_the_worst_finished(early_stopping, length_penalty, done):
    beams = small(early_stopping, length_penalty)
    step(beams, (-1, 0, 7), (-1.5, 0, 8), (-3, 0, 9), (-4, 0, 6))
    step(beams, (-1.9, 0, EOS), (-2.0, 1, EOS), (-4.0, 0, 9), (-5, 0, 6))
    assert beams.done == done


def test_a_running_beam_that_is_only_as_good_cannot_improve():
    beams = small(length_penalty=0.0)
    step(beams, (-1, 0, EOS), (-2, 0, 8), (-3, 0, 9), (-4, 0, 6))
    step(beams, (-3, 0, EOS), (-3, 1, 8), (-4, 0, 9), (-5, 0, 6))
    assert beams.done


def test_at_the_limit_all_first_candidates_finish():
    beams = small(max_tokens=1)
    assert step(beams, (-1, 0, 7), (-2, 0, EOS), (-3, 0, 9), (-4, 0, 6)) == []
    assert beams.done
    assert [(h.token_ids, h.finish_reason) for h in beams.best()] == [([7], "length"), ([EOS], "stop")]


def test_number_of_candidates():
    for eos, expected in (((), 6), ((4,), 6), ((4, 5), 9), ((4, 5, 6), 12)):
        assert BeamSearch(3, 1, 5, 9, 1.0, False, frozenset(eos)).num_candidates == expected


def test_long_hypotheses_need_no_recursion():
    node = None
    for token in range(50_000):
        node = Node(node, token)
    assert [n.token for n in path(node)] == list(range(50_000))
    assert repr(node)
