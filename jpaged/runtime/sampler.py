"""Sampling on the device: from logits to one token a row.

The random number of a token depends on its request's seed, its sequence's index and its position alone
(DESIGN, contract 8): `fold_in(fold_in(seed, index), position)`. What else runs, and how the prompt was cut,
never changes it.

Filters need no sort. Each keeps the tokens above a threshold, and the threshold is found by bisection over
the 32 bits of an order-preserving integer image of the logits, so it is exact over the whole vocabulary.
Tokens that tie with the threshold are kept.
"""

import jax
import jax.numpy as jnp

from jpaged.models.batch_invariant import log_normaliser
from jpaged.runtime import beam_selection
from jpaged.runtime.state import FLOATS, INTEGERS, MAX_BAD_WORD_TOKENS, NO_TOKEN, Rules
from jpaged.scheduling.plan import Variant

_TINY, _HUGE = float(jnp.finfo(jnp.float32).tiny), float(jnp.finfo(jnp.float32).max)


def sample(
    tokens: jax.Array,  # int32 [rows, L]: the batch's tokens
    parameters: jax.Array,  # int32 [rows, NUM_PARAMETERS]
    rules: Rules,
    logits: jax.Array,  # float32 [N, V]
    rows: jax.Array,  # int32 [N]
    positions: jax.Array,  # int32 [N]
    searches: jax.Array,  # int32, see `beam_selection.pack_searches`; [0] if nobody searches
    masks: jax.Array | None = None,  # uint32 [N, ceil(V / 32)]: what grammars allow; None if there are none
    *,
    variant: Variant,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Chooses the tokens at `positions` of `rows` and writes them into the batch's tokens.

    Beams get a token too; what really follows them is for the host to say, and overwritten by the next step's edits.

    Args:
      variant: which parts are compiled in; a part that is left out must be neutral for all rows.

    Returns: (tokens with the new ones written, results int32 [N, 1 + ...]: the token, then the columns of
    `logprobs`, candidates of the beam groups or None).
    """
    raw, mine = logits, parameters[rows]
    floats = jax.lax.bitcast_convert_type(mine[:, : len(FLOATS)], jnp.float32)
    p = dict(zip(FLOATS, floats.T, strict=True)) | dict(zip(INTEGERS, mine[:, len(FLOATS) :].T, strict=True))
    if variant.penalties:
        logits = penalize(logits, tokens[rows], positions, p)
    if variant.rules:
        edited = apply_rules(logits, tokens[rows], positions, jax.tree.map(lambda leaf: leaf[rows], rules))
        logits = jnp.where(p["needs_rules"][:, None] > 0, edited, logits)
    searched, allowed = logits, None if masks is None else _unpack(masks, logits.shape[-1])
    if allowed is not None:
        logits = constrain(logits, allowed, raw)
    chosen = _argmax(logits)
    if variant.sample:
        keys = jax.vmap(_key)(p["seed_high"], p["seed_low"], p["sequence_index"], positions)
        greedy = p["temperature"] < _TINY
        # The best token is at 0 whatever divides it, so that no temperature makes two of them infinite.
        scaled = (logits - logits.max(axis=-1, keepdims=True)) / jnp.where(greedy, 1.0, p["temperature"])[:, None]
        if variant.truncate:
            scaled = truncate(scaled, p["top_k"], p["top_p"], p["min_p"])
        chosen = jnp.where(greedy, chosen, draw(scaled, keys))
    tokens = tokens.at[rows, positions].set(chosen, mode="drop")
    results = jnp.concatenate([chosen[:, None], logprobs(raw, chosen, variant.num_logprobs)], axis=1)
    count = variant.num_beam_candidates
    return tokens, results, beam_selection.select(searched, searches, count, allowed) if count else None


def _argmax(x: jax.Array) -> jax.Array:
    """The first index of the largest of x [N, V]; two plain reductions, which XLA:CPU runs 6 times faster than argmax.

    A row of NaNs has no largest; the last index then, so that a broken model does not index beyond its arrays.
    """
    index = jnp.arange(x.shape[-1], dtype=jnp.int32)
    return jnp.where(x == x.max(axis=-1, keepdims=True), index, x.shape[-1] - 1).min(axis=-1)


def _key(high: jax.Array, low: jax.Array, index: jax.Array, position: jax.Array) -> jax.Array:
    seed = jax.random.wrap_key_data(jnp.stack([high, low]).astype(jnp.uint32), impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(seed, index), position)


def penalize(logits: jax.Array, tokens: jax.Array, lengths: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
    """Repetition (prompt and output), presence and frequency (output) penalties; as vLLM's.

    Args:
      logits: [N, V].
      tokens: int32 [N, L], of which the first lengths[n] are known.
    """
    n, vocab = logits.shape
    at, row = jnp.arange(tokens.shape[1]), jnp.arange(n)[:, None]
    known = at < lengths[:, None]
    output = known & (at >= p["prompt_length"][:, None])
    zeros = jnp.zeros((n, vocab), jnp.int32)
    seen = zeros.at[row, tokens].max(known.astype(jnp.int32)) > 0
    counts = zeros.at[row, tokens].add(output.astype(jnp.int32))
    factor = p["repetition_penalty"][:, None]
    divided = jnp.minimum(logits / factor, _HUGE)  # a tiny penalty must not make two tokens infinite
    logits = jnp.where(seen, jnp.where(logits > 0, divided, logits * factor), logits)
    logits -= p["frequency_penalty"][:, None] * counts
    return logits - p["presence_penalty"][:, None] * (counts > 0)


def apply_rules(logits: jax.Array, tokens: jax.Array, lengths: jax.Array, rules: Rules) -> jax.Array:
    """logit_bias, then -inf for tokens that are not allowed, end a bad word, or would end the text too early.

    Where this would leave a row no token at all, the masks are ignored: some token must be next.
    """
    n, vocab = logits.shape
    row = jnp.arange(n)[:, None]
    logits = logits.at[row, _or_drop(rules.bias_tokens, vocab)].add(rules.bias_values, mode="drop")
    early = (lengths < rules.min_length)[:, None] & (rules.suppressed != NO_TOKEN)
    banned = jnp.concatenate(
        [jnp.where(early, rules.suppressed, NO_TOKEN), _completing(tokens, lengths, rules.bad_words)], axis=1
    )
    masked = (
        jnp.where(_unpack(rules.allowed, vocab), logits, -jnp.inf)
        .at[row, _or_drop(banned, vocab)]
        .set(-jnp.inf, mode="drop")
    )
    return jnp.where(jnp.any(masked > -jnp.inf, axis=-1, keepdims=True), masked, logits)


def constrain(logits: jax.Array, allowed: jax.Array, raw: jax.Array) -> jax.Array:
    """-inf for tokens that a row's grammar does not allow (bool [N, V]).

    Where the rules before it leave none of those that it does, they give way: `raw` decides among these.
    """
    masked = jnp.where(allowed, logits, -jnp.inf)
    some_left = jnp.any(masked > -jnp.inf, axis=-1, keepdims=True)
    return jnp.where(some_left, masked, jnp.where(allowed, raw, -jnp.inf))


def _unpack(bits: jax.Array, vocab: int) -> jax.Array:
    """bool [N, V] of uint32 [N, ceil(V / 32)]."""
    token = jnp.arange(vocab)
    return (bits[:, token // 32] >> (token % 32).astype(jnp.uint32)) & 1 == 1


def _or_drop(tokens: jax.Array, vocab: int) -> jax.Array:
    return jnp.where(tokens == NO_TOKEN, vocab, tokens)  # an index beyond the end is dropped, -1 would wrap


def _completing(tokens: jax.Array, lengths: jax.Array, words: jax.Array) -> jax.Array:
    """The last token of every bad word whose other tokens are the last ones of the text; else NO_TOKEN. [N, B]."""
    back = lengths[:, None] - jnp.arange(MAX_BAD_WORD_TOKENS - 1, 0, -1)  # positions of the latest tokens
    latest = jnp.where(back >= 0, jnp.take_along_axis(tokens, jnp.maximum(back, 0), axis=1), NO_TOKEN)
    prefix, last = words[:, :, :-1], words[:, :, -1]
    matches = jnp.all((prefix == NO_TOKEN) | (prefix == latest[:, None]), axis=-1)
    return jnp.where(matches, last, NO_TOKEN)


def truncate(logits: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """Sets to -inf what min-p, top-k and then top-p (on the renormalised rest) leave out.

    Args:
      logits: float32 [N, V], already divided by the temperature.
      top_k: int32 [N], 0 keeps all. top_p: float32 [N] in (0, 1]. min_p: float32 [N] in [0, 1].
    """
    order = _ordered(logits)
    best = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - best)
    wanted = jnp.where(top_k > 0, top_k, logits.shape[-1])
    low = _threshold(order, lambda kept: kept.sum(-1) >= wanted)
    keep = (order >= low[:, None]) & (weights >= min_p[:, None])
    weights = jnp.where(keep, weights, 0.0)
    mass = jnp.maximum(top_p * weights.sum(-1), _TINY)  # of a tiny top_p too, the best token must be left
    low = _threshold(order, lambda kept: jnp.where(kept, weights, 0.0).sum(-1) >= mass)
    # At top_p = 1 rounding must not drop a tail: everything is kept.
    return jnp.where(keep & ((order >= low[:, None]) | (top_p >= 1)[:, None]), logits, -jnp.inf)


def _ordered(x: jax.Array) -> jax.Array:
    """int32 image of float32 that keeps the order: flips the magnitude bits of negatives."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _threshold(order: jax.Array, enough) -> jax.Array:
    """The largest t, for each row, such that the tokens with order >= t are enough. [N]

    Built bit by bit from the top; `enough` holds for the smallest integer and is monotone.
    """

    def body(i, t):
        # The sign bit is the top one and counts downwards: starting from INT_MIN, adding 2^31 wraps to 0.
        candidate = t + (jnp.int32(1) << (31 - i))
        return jnp.where(enough(order >= candidate[:, None]), candidate, t)

    return jax.lax.fori_loop(0, 32, body, jnp.full(order.shape[:1], jnp.iinfo(jnp.int32).min, jnp.int32))


def draw(logits: jax.Array, keys: jax.Array) -> jax.Array:
    """Draws from softmax(logits) [N, V], one key a row: the token whose exponential clock rings first.

    With clocks E ~ Exp(1), argmax(p / E) is distributed as p (Gumbel-max, written with one logarithm). Each token has
    a clock of its own, so the rounding that differs between batch shapes moves a draw only if two clocks are within
    rounding of each other, or if a token at the edge of a filter would have won; inverting a cumulative sum would
    feel every token before the drawn one.
    """
    bits = jax.vmap(lambda key: jax.random.bits(key, logits.shape[1:], jnp.uint32))(keys)
    # All 32 bits near 0, where winners are; never 0 or 1, where a clock would ring at once or not at all.
    uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    return _argmax(weights / -jnp.log1p(-uniform))


def logprobs(logits: jax.Array, tokens: jax.Array, count: int) -> jax.Array:
    """Log-probabilities as int32 bits: chosen's logprob | chosen's rank | ids of the most likely [k] | theirs [k].

    count < 0 gives no columns. The k largest logits are found before anything is normalised.
    """
    if count < 0:
        return jnp.zeros((logits.shape[0], 0), jnp.int32)
    high, rest = log_normaliser(logits)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
    rank = 1 + (logits > chosen).sum(-1, keepdims=True, dtype=jnp.int32)
    columns = [_bits(chosen - high - rest), rank]
    if count:
        best, ids = jax.lax.top_k(logits, count)
        columns += [ids.astype(jnp.int32), _bits(best - high - rest)]
    return jnp.concatenate(columns, axis=1)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)
