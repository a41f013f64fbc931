"""The device's half of a beam search: the best continuations of each group's beams (paper, section 4.4).

Out of W beams x V tokens, K numbers a group reach the host; `jpaged.scheduling.beam_search` does the rest.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.scheduling.beams import Candidates
from jpaged.scheduling.plan import StepPlan


def num_members(count: int) -> int:
    """Beams that a group of `count` candidates has at most: two candidates a beam at least."""
    return count // 2


def packed_size(num_results: int, count: int) -> int:
    return num_results * (1 + num_members(count)) if count else 0


def pack_searches(plan: StepPlan) -> np.ndarray:
    """int32 [packed_size]: of each result the running score of its beam (bits), then members [N, W] by rank; -1 pads.

    Empty if nobody searches.
    """
    n, width = plan.bucket.num_results, num_members(plan.variant.num_beam_candidates)
    if not width:
        return np.zeros(0, np.int32)
    scores, members = np.zeros(n, np.float32), np.full((n, width), -1, np.int32)
    for i, (group, mine) in enumerate(plan.beams):
        members[i, : len(mine)] = mine
        scores[mine] = group.beams.scores  # type: ignore[union-attr]  # of a beam group
    return np.concatenate([scores.view(np.int32), members.reshape(-1)])


def select(logits: jax.Array, searches: jax.Array, count: int, allowed: jax.Array | None = None) -> jax.Array:
    """The `count` best continuations of each group of beams.

    Args:
      logits: float32 [N, V].
      searches: int32, as `pack_searches` makes it.
      allowed: bool [N, V]: tokens that grammars allow. The others' probabilities stay with them: a beam's score is
        the model's own, as with Hugging Face's `prefix_allowed_tokens_fn`.

    Returns: int32 [G, 3, count], best first: cumulative log-probabilities (bits; -inf: there is no such continuation),
    parents' ranks, tokens. G = N.
    """
    n, vocab = logits.shape
    per_beam = min(count, vocab)
    scores = jax.lax.bitcast_convert_type(searches[:n], jnp.float32)
    members = searches[n:].reshape(n, num_members(count))
    # A group's best are among its beams' best.
    logprobs = jax.nn.log_softmax(logits)
    if allowed is not None:
        logprobs = jnp.where(allowed, logprobs, -jnp.inf)
    best, tokens = jax.lax.top_k(logprobs, per_beam)  # [N, per_beam]
    best = jnp.where(members[..., None] >= 0, (best + scores[:, None])[members], -jnp.inf)  # [G, W, per_beam]
    values, index = jax.lax.top_k(best.reshape(n, -1), count)
    parents = index // per_beam
    tokens = tokens[jnp.take_along_axis(members, parents, axis=1), index % per_beam]
    return jnp.stack([jax.lax.bitcast_convert_type(values, jnp.int32), parents, tokens], axis=1)


def unpack_candidates(selected: np.ndarray) -> Candidates:
    """`select`'s result on the host."""
    return Candidates(selected[:, 0].view(np.float32), selected[:, 1], selected[:, 2])
