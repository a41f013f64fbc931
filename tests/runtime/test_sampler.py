"""The sampler against plain NumPy: each piece alone, and `sample` as a step calls it."""

from collections import Counter

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jpaged.outputs import RequestMetrics
from jpaged.runtime import sampler, state
from jpaged.runtime.state import FLOATS, MAX_BAD_WORD_TOKENS, NO_TOKEN
from jpaged.sampling_params import SamplingParams
from jpaged.scheduling.plan import Variant
from jpaged.sequence import Sequence, SequenceGroup

VOCAB = 83  # no multiple of a word of bits or of a tile
LENGTH = 24
EVERYTHING = Variant(sample=True, truncate=True, penalties=True, rules=True, num_logprobs=5)
ROWS = 6


def row(prompt, output=(), *, index=0, bad_words=(), stop_tokens=(), **params):
    """A sequence that runs, and its bad words in tokens."""
    params = SamplingParams(**{"temperature": 0, "max_tokens": 100, "stop_token_ids": stop_tokens} | params)
    group = SequenceGroup("r", None, list(prompt), params, params.seed or 0, (0, 0), RequestMetrics(arrival_time=0.0))
    sequence = Sequence(group, index, [*prompt, *output], LENGTH, frozenset(params.stop_token_ids))
    group.sequences = [sequence]
    return sequence, [list(word) for word in bad_words]


_admit, _set_rules = jax.jit(state.admit), jax.jit(state.set_rules)


def batch(*members, vocab=VOCAB) -> state.BatchState:
    """The device's batch state with the members in rows 0, 1, ..., made by the code that the runner uses."""
    made = state.empty(ROWS, LENGTH, LENGTH // 4, vocab)
    for number, (sequence, bad_words) in enumerate(members):
        sequence.row = number
        made = _admit(made, state.pack_admission(sequence, np.zeros(LENGTH // 4, np.int32), LENGTH))
        made = _set_rules(made, np.int32(number), state.rules_of(sequence, vocab, bad_words))
    return made


_sample = jax.jit(sampler.sample, static_argnames="variant")


def sample(made, logits, rows, positions, variant=EVERYTHING):
    """(chosen tokens, all result columns, the batch's tokens afterwards). Padded as a plan is, to few shapes."""
    count = len(rows)
    size = ROWS if count <= ROWS else count
    padded = np.zeros((size, VOCAB), np.float32)
    padded[:count] = logits
    fill = [0] * (size - count)
    tokens, results, _ = _sample(
        made.tokens,
        made.parameters,
        made.rules,
        padded,
        np.array([*rows, *(ROWS for _ in fill)], np.int32),
        np.array([*positions, *fill], np.int32),
        np.zeros(0, np.int32),
        variant=variant,
    )
    return np.asarray(results[:count, 0]), np.asarray(results[:count]), np.asarray(tokens)


def choose(member, logits, variant=EVERYTHING):
    """The next token of one sequence."""
    return int(sample(batch(member), np.asarray(logits)[None], [0], [len(member[0].tokens)], variant)[0][0])


def distinct_logits(seed, shape=(VOCAB,), scale=3.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


# ------------------------------------------------------------------------------------------------------- penalties


def penalized(logits, prompt, output, presence, frequency, repetition):
    """vLLM's definition, token by token."""
    logits = np.array(logits, np.float64)
    for token in {*prompt, *output}:
        logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
    for token, count in Counter(output).items():
        logits[token] -= frequency * count + presence
    return logits


tokens_of = st.lists(st.integers(0, VOCAB - 1) | st.sampled_from([0, 5, VOCAB - 1]), max_size=10)


@given(
    prompt=tokens_of.filter(len),
    output=tokens_of,
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    repetition=st.floats(0.05, 2),
    seed=st.integers(0, 99),
)
def test_penalties_are_vllms(prompt, output, presence, frequency, repetition, seed):
    made = batch(
        row(prompt, output, presence_penalty=presence, frequency_penalty=frequency, repetition_penalty=repetition)
    )
    made = made._replace(tokens=made.tokens.at[:, len(prompt) + len(output) :].set(7))  # of whoever had the row before
    logits = distinct_logits(seed)
    found = _penalize(
        made.parameters[:1], jnp.asarray(logits)[None], made.tokens[:1], np.array([len(prompt) + len(output)])
    )
    np.testing.assert_allclose(
        found[0], penalized(logits, prompt, output, presence, frequency, repetition), rtol=1e-5, atol=1e-5
    )


@jax.jit
def _penalize(parameters, logits, tokens, lengths):
    floats = jax.lax.bitcast_convert_type(parameters[:, : len(FLOATS)], jnp.float32)
    p = dict(zip(FLOATS, floats.T, strict=True))
    p["prompt_length"] = parameters[:, len(FLOATS) + state.INTEGERS.index("prompt_length")]
    return sampler.penalize(logits, tokens, lengths, p)


def test_a_tiny_repetition_penalty_does_not_overflow():
    logits = np.full(VOCAB, -1.0, np.float32)
    logits[[3, 4]] = 2.0, 1.0
    member = row([3, 4], repetition_penalty=1e-44, temperature=1, seed=1)
    assert choose(member, logits) in (3, 4)


def test_penalties_leave_masked_tokens_masked():
    logits = np.full(VOCAB, -np.inf, np.float32)
    logits[[1, 2]] = 1.0, 0.5
    assert choose(row([9], [9, 1], presence_penalty=-2, frequency_penalty=-2, repetition_penalty=0.1), logits) == 1
    assert choose(row([9], [1], presence_penalty=2), logits) == 2


# ----------------------------------------------------------------------------------------------------------- rules

_apply_rules = jax.jit(sampler.apply_rules)


def ruled(made, logits, lengths):
    """What the rules of rows 0, 1, ... make of their logits."""
    n = len(lengths)
    return np.asarray(
        _apply_rules(jnp.asarray(logits), made.tokens[:n], np.array(lengths), jax.tree.map(lambda x: x[:n], made.rules))
    )


def test_bias_is_added_to_its_tokens_alone():
    logits = distinct_logits(0)
    bias = {0: 100.0, 17: 2.5, VOCAB - 1: -100.0}
    made = batch(row([1], logit_bias=bias))
    found = ruled(made, logits[None], [1])
    expected = logits.copy()
    for token, value in bias.items():
        expected[token] += np.float32(value)
    np.testing.assert_array_equal(found[0], expected)


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 257])
def test_the_allowed_mask_on_any_vocabulary(vocab):
    logits = distinct_logits(1, vocab)
    for allowed in ([0], [vocab - 1], list(range(0, vocab, 3)), list(range(vocab))):
        made = batch(row([0], allowed_token_ids=allowed), row([0]), vocab=vocab)
        found = ruled(made, np.stack([logits, logits]), [1, 1])
        expected = np.full(vocab, -np.inf, np.float32)
        expected[allowed] = logits[allowed]
        np.testing.assert_array_equal(found[0], expected)
        np.testing.assert_array_equal(found[1], logits, "the row without rules")


@pytest.mark.parametrize(
    ("word", "text", "banned"),
    [
        ([5], [1], 5),
        ([5], [5, 5], 5),
        ([2, 5], [1, 2], 5),
        ([2, 5], [2, 1], None),
        ([2, 5], [2], 5),
        ([1, 2, 5], [1, 2], 5),
        ([3, 1, 2, 5], [1, 2], None),  # the text is shorter than the word's beginning
        ([0, 0, 5], [0], None),  # ... and what stands before it is not token 0
        ([5, 5], [9, 5], 5),
        ([1, 2, 3, 4, 5, 6, 7, 8], [9, 1, 2, 3, 4, 5, 6, 7], 8),
        ([1, 2, 3, 4, 5, 6, 7, 8], [9, 9, 2, 3, 4, 5, 6, 7], None),
    ],
)
def test_bad_words_end_nowhere(word, text, banned):
    made = batch(row(text[:1], text[1:], bad_words=[[40, 41], word]), row(text))
    logits = distinct_logits(2)
    found = ruled(made, np.stack([logits, logits]), [len(text)] * 2)
    assert np.flatnonzero(np.isneginf(found[0])).tolist() == ([] if banned is None else [banned])
    np.testing.assert_array_equal(found[1], logits)


def test_the_longest_bad_word_fits():
    assert MAX_BAD_WORD_TOKENS == 8, "the cases above end with one of this length"


def test_no_end_before_min_tokens():
    logits = np.zeros(VOCAB, np.float32)
    logits[[7, 8, 9]] = 3.0, 2.0, 1.0
    for outputs, expected in ((0, 9), (1, 9), (2, 7), (3, 7)):
        assert choose(row([1, 2], [4] * outputs, stop_tokens=[7, 8], min_tokens=2), logits) == expected


def test_masks_that_would_leave_nothing_are_ignored_but_the_bias_is_not():
    logits = np.zeros(VOCAB, np.float32)
    logits[30] = 1.0
    assert choose(row([1], allowed_token_ids=[5], bad_words=[[5]]), logits) == 30
    assert choose(row([1], allowed_token_ids=[5], bad_words=[[5]], logit_bias={31: 2.0}), logits) == 31
    assert choose(row([1], allowed_token_ids=[5], bad_words=[[6]]), logits) == 5


# --------------------------------------------------------------------------------------------------------- filters


def kept_by(logits, top_k, top_p, min_p, slack=0.0):
    """What min-p, top-k and top-p keep, by sorting, in float64; slack > 0 keeps what is nearly kept, < 0 drops it."""
    logits = np.asarray(logits, np.float64)
    weights = np.exp(logits - logits.max())
    order = np.argsort(-logits, kind="stable")
    keep = [t for t in order if weights[t] >= min_p * (1 - slack) and logits[t] > -np.inf]
    if top_k > 0:
        keep = keep[:top_k]
    if top_p >= 1:
        return set(keep)
    upto = np.cumsum(weights[keep]) / weights[keep].sum()
    return set(keep[: 1 + int((upto < top_p + slack).sum())])


_truncate = jax.jit(sampler.truncate)
SLACK = 2e-6  # of float32 sums over the vocabulary


@settings(max_examples=300)
@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.01, 1.0, 3.0, 30.0]),
    top_k=st.integers(0, VOCAB + 3),
    top_p=st.floats(0, 1, exclude_min=True) | st.sampled_from([1.0, 0.9, 1e-6]),
    min_p=st.floats(0, 1) | st.sampled_from([0.0, 1.0]),
    masked=st.booleans(),
)
def test_filters_keep_exactly_what_sorting_keeps(seed, scale, top_k, top_p, min_p, masked):
    logits = distinct_logits(seed, scale=scale)
    if masked:
        logits[np.random.default_rng(seed).random(VOCAB) < 0.5] = -np.inf
        logits[seed % VOCAB] = 1.0
    assert len(set(logits[logits > -np.inf])) == (logits > -np.inf).sum(), "no ties here"
    found = np.asarray(
        _truncate(logits[None], np.array([top_k]), np.array([top_p], np.float32), np.array([min_p], np.float32))[0]
    )
    kept = set(np.flatnonzero(found > -np.inf))
    assert kept_by(logits, top_k, top_p, min_p, -SLACK) <= kept <= kept_by(logits, top_k, top_p, min_p, SLACK)
    np.testing.assert_array_equal(found[sorted(kept)], logits[sorted(kept)])


def test_each_filter_alone():
    logits = np.log(np.array([[0.4, 0.05, 0.3, 0.15, 0.1]], np.float32))

    def kept(top_k=0, top_p=1.0, min_p=0.0):
        found = _truncate(logits, np.array([top_k]), np.array([top_p], np.float32), np.array([min_p], np.float32))
        return np.flatnonzero(found[0] > -np.inf).tolist()

    assert kept() == kept(top_k=5) == kept(top_k=99) == [0, 1, 2, 3, 4]
    assert kept(top_k=1) == kept(top_p=0.3) == kept(top_p=1e-30) == kept(min_p=1.0) == [0]
    assert kept(top_k=3) == kept(top_p=0.8) == kept(min_p=0.3) == [0, 2, 3]
    assert kept(top_p=0.69) == [0, 2]
    assert kept(top_k=2, top_p=0.5) == [0], "0.4 of 0.7 is more than half"
    assert kept(min_p=0.3, top_k=2) == [0, 2]


def test_top_p_of_one_keeps_a_tail_that_is_lost_in_the_sum():
    logits = np.array([[0.0, *(-30.0 - i for i in range(VOCAB - 1))]], np.float32)
    found = _truncate(logits, np.array([0]), np.array([1.0], np.float32), np.array([0.0], np.float32))
    np.testing.assert_array_equal(found, logits)


@pytest.mark.parametrize("top_p", [1e-37, 1e-40, 1e-45, 1e-300])
def test_the_smallest_top_p_keeps_the_best_token(top_p):
    logits = distinct_logits(4)
    found = _truncate(logits[None], np.array([0]), np.array([top_p], np.float32), np.array([0.0], np.float32))
    assert np.flatnonzero(found[0] > -np.inf).tolist() == [logits.argmax()]


def test_tokens_that_tie_with_the_last_one_kept_are_kept():
    """One could choose among them by their ids; keeping them all is fair, and what a threshold does."""
    logits = np.array([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]], np.float32)
    for top_k, top_p in ((2, 1.0), (0, 0.5)):
        found = _truncate(logits, np.array([top_k]), np.array([top_p], np.float32), np.array([0.0], np.float32))
        assert np.flatnonzero(found[0] > -np.inf).tolist() == [1, 2, 3, 4]


def test_rows_are_filtered_by_their_own_parameters():
    logits = distinct_logits(5, (4, VOCAB))
    top_k, top_p, min_p = (
        np.array([0, 3, 0, 7]),
        np.array([1.0, 1.0, 0.7, 0.9], np.float32),
        np.array([0.2, 0, 0, 0.01], np.float32),
    )
    found = np.asarray(_truncate(logits, top_k, top_p, min_p))
    for i in range(4):
        assert set(np.flatnonzero(found[i] > -np.inf)) == kept_by(logits[i], top_k[i], top_p[i], min_p[i])


# ----------------------------------------------------------------------------------------------------------- draws

_draw = jax.jit(sampler.draw)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed, impl="threefry2x32"), count)


def test_a_draw_is_the_clock_that_rings_first_as_float64_sees_it():
    logits = distinct_logits(6, (400, VOCAB))
    logits[:, 50:60] = -np.inf
    found = np.asarray(_draw(logits, keys(400)))
    bits = np.asarray(jax.vmap(lambda key: jax.random.bits(key, (VOCAB,), jnp.uint32))(keys(400))).astype(np.float64)
    clocks = np.log(-np.log1p(-(bits + 0.5) / 2**32)) - logits  # of the logarithm: exp underflows
    first, second = np.sort(clocks, axis=1)[:, :2].T
    clear = second - first > 1e-5
    assert clear.sum() > 390
    np.testing.assert_array_equal(found[clear], clocks.argmin(axis=1)[clear])


@pytest.mark.parametrize(("vocab", "draws", "scale"), [(7, 40_000, 1.0), (83, 40_000, 2.0), (20_000, 600, 0.5)])
def test_draws_are_distributed_as_softmax(vocab, draws, scale):
    """Chi-square over cells of tokens; the seeds are fixed, so this either always holds or never."""
    logits = distinct_logits(7, vocab, scale)
    probabilities = np.exp(logits.astype(np.float64) - logits.max())
    probabilities /= probabilities.sum()
    draw_some = jax.jit(lambda some: sampler.draw(jnp.broadcast_to(logits, (len(some), vocab)), some))
    counts = np.zeros(vocab)
    for some in np.split(keys(draws, seed=1), draws // 200):
        np.add.at(counts, np.asarray(draw_some(some)), 1)
    cells = np.minimum(np.cumsum(probabilities[np.argsort(-logits)]) * 20, 19).astype(
        int
    )  # of likely and unlikely ones
    expected = np.bincount(cells, probabilities[np.argsort(-logits)], 20) * draws
    observed = np.bincount(cells, counts[np.argsort(-logits)], 20)
    used = expected > 0
    statistic = ((observed - expected)[used] ** 2 / expected[used]).sum()
    freedom = used.sum() - 1
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)


def test_a_masked_token_is_never_drawn():
    logits = np.full((2000, VOCAB), -np.inf, np.float32)
    logits[:, [3, 77]] = [-80.0, 0.0]  # one of them nearly impossible
    assert set(np.asarray(_draw(logits, keys(2000)))) == {77}
    logits[:, 77] = -80.0
    assert set(np.asarray(_draw(logits, keys(2000)))) == {3, 77}


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-37, 1.2e-38, 1e-40, 1e-300])
def test_a_temperature_near_zero_is_nearly_greedy(temperature):
    logits = distinct_logits(8, scale=20.0)
    for seed in range(5):
        assert choose(row([1], temperature=temperature, seed=seed), logits) == logits.argmax()


def test_logits_that_are_no_numbers_give_a_token_of_the_vocabulary():
    """A broken model must not make the engine index beyond its arrays."""
    logits = np.full(VOCAB, np.nan, np.float32)
    for temperature in (0, 1):
        assert 0 <= choose(row([1], temperature=temperature), logits) < VOCAB


# ------------------------------------------------------------------------------------------------------------ keys


def test_a_draw_depends_on_seed_index_and_position_and_on_nothing_else():
    logits = distinct_logits(9, scale=0.5)
    member = {"temperature": 1, "seed": 2**63 + 12345, "index": 3}
    expected = choose(row([1, 2], **member), logits)
    other = [row([5, 6, 7], temperature=1, seed=i) for i in range(ROWS - 1)]
    for place in range(ROWS):
        members = [*other[:place], row([9, 8], **member), *other[place:]]
        rows = np.roll(np.arange(ROWS), place)
        positions = np.array([len(members[r][0].tokens) for r in rows])
        mixed = np.where((rows == place)[:, None], logits, distinct_logits(10, (ROWS, VOCAB)))
        chosen = sample(batch(*members), mixed, rows, positions)[0]
        assert chosen[rows.tolist().index(place)] == expected


def test_every_part_of_the_key_counts():
    """Each change of one part gives another stream: 20 draws of 83 tokens are never the same by chance."""

    def stream(seed=7, index=0, first=1):
        members = [row([1], temperature=1, seed=seed, index=index)]
        made = batch(*members)
        logits = np.zeros((20, VOCAB), np.float32)
        return tuple(sample(made, logits, [0] * 20, range(first, first + 20), Variant(sample=True))[0])

    streams = [
        stream(),
        stream(seed=8),
        stream(seed=7 + 2**32),
        stream(seed=7 + 2**63),
        stream(index=1),
        stream(first=2),
    ]
    assert len(set(streams)) == len(streams)
    assert stream()[1:] == stream(first=2)[:-1], "the stream itself is a function of the position"
    assert len(set(stream())) > 10


# ---------------------------------------------------------------------------------------- the whole, and its variants


def test_neutral_parameters_change_nothing_whatever_is_compiled_in():
    greedy, drawn = row([1, 2], [3]), row([1, 2], [3], temperature=0.8, seed=5)
    made, logits = batch(greedy, drawn), distinct_logits(11, (2, VOCAB))
    plain = sample(made, logits, [0, 1], [3, 3], Variant(sample=True))[0]
    assert plain[0] == logits[0].argmax()
    for variant in (Variant(sample=True, truncate=True), EVERYTHING):
        np.testing.assert_array_equal(sample(made, logits, [0, 1], [3, 3], variant)[0], plain)
    for variant in (Variant(), Variant(penalties=True, rules=True)):
        assert sample(made, logits, [0, 1], [3, 3], variant)[0][0] == plain[0]


def test_a_greedy_row_beside_rows_that_ask_for_everything():
    greedy = row([1, 2], [3])
    wild = row(
        [4],
        [5, 5],
        temperature=2,
        top_k=3,
        top_p=0.5,
        min_p=0.1,
        presence_penalty=1,
        logit_bias={2: 50.0},
        seed=1,
        allowed_token_ids=[1, 2, 3],
        bad_words=[[1]],
    )
    logits = distinct_logits(12, (2, VOCAB))
    made = batch(greedy, wild)
    chosen = sample(made, logits, [0, 1], [3, 3])[0]
    assert chosen.tolist() == [logits[0].argmax(), 2]


def test_greedy_takes_the_first_of_equals():
    logits = np.zeros(VOCAB, np.float32)
    logits[[20, 40]] = 1.0
    assert choose(row([1]), logits) == 20


def test_tokens_are_written_where_they_are_wanted():
    members = [row([1, 2]), row([3]), row([4] * LENGTH)]
    made = batch(*members)
    logits = distinct_logits(13, (3, VOCAB))
    chosen, _, tokens = sample(made, logits, [1, ROWS, 2], [1, 9, LENGTH], Variant())
    assert tokens[1].tolist() == [3, chosen[0]] + [0] * (LENGTH - 2)
    np.testing.assert_array_equal(tokens[[0, 2]], np.asarray(made.tokens)[[0, 2]], "unwanted, or past the end: dropped")


@pytest.mark.parametrize("count", [-1, 0, 5, 20])
def test_logprobs_are_of_the_raw_distribution(count):
    logits = distinct_logits(14, (3, VOCAB))
    logits[2, 10:] = -np.inf
    logits[2, :10] = np.arange(10)
    made = batch(row([1], logit_bias={4: 100.0}), row([1], temperature=2, seed=3), row([1]))
    chosen, results, _ = sample(made, logits, [0, 1, 2], [1, 1, 1], EVERYTHING._replace(num_logprobs=count))
    assert chosen[0] == 4
    if count < 0:
        assert results.shape == (3, 1)
        return
    wide = logits.astype(np.float64)
    log_softmax = (
        wide - np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1, keepdims=True)) - wide.max(1, keepdims=True)
    )
    floats = results.view(np.float32)
    each = np.arange(3)
    assert results.shape == (3, 3 + 2 * count)
    np.testing.assert_allclose(floats[:, 1], log_softmax[each, chosen], atol=1e-5)
    np.testing.assert_array_equal(results[:, 2], 1 + (logits > logits[each, chosen][:, None]).sum(1))
    order = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(results[:, 3 : 3 + count], order)
    np.testing.assert_allclose(floats[:, 3 + count :], np.take_along_axis(log_softmax, order, 1), atol=1e-5)


def test_padding_lanes_of_the_vocabulary_never_win():
    logits = np.full(VOCAB, -np.inf, np.float32)
    logits[:3] = -50.0, -60.0, -55.0
    for temperature in (0, 1, 2):
        assert choose(row([1], temperature=temperature, presence_penalty=2, min_p=0.5), logits) in (0, 1, 2)
    _, results, _ = sample(batch(row([1])), logits[None], [0], [1])
    assert results[0, 3:6].tolist() == [0, 2, 1]
    assert not np.isnan(results.view(np.float32)[0]).any()


def test_unused_rules_are_no_tokens():
    assert NO_TOKEN < 0


def test_a_mask_comes_before_every_rule():
    """Greedy rows: masked; masked and left nothing by the rules; not masked."""
    logits = np.tile(np.arange(VOCAB, dtype=np.float32), (3, 1))
    made = batch(row([1]), row([1], allowed_token_ids=[0]), row([1]))
    masks = np.full((3, -(-VOCAB // 32)), 0xFFFFFFFF, np.uint32)
    masks[:2] = 0
    masks[:2, 0] = 0b1010  # tokens 1 and 3
    _, results, _ = _sample(made.tokens, made.parameters, made.rules, logits, np.array([0, 1, 2]), np.array([1, 1, 1]),
        np.zeros(0, np.int32), masks, variant=Variant(rules=True, structured=True, num_logprobs=0))  # fmt: skip
    assert results[:, 0].tolist() == [3, 3, VOCAB - 1]
    assert results[:, 2].tolist() == [VOCAB - 3, VOCAB - 3, 1], "ranks are of the raw distribution"
