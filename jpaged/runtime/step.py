"""The device side of the engine, as two pure functions that are launched one after the other:

    forward(params, pool, tables, tokens, plan) -> (pool, tables, Forward: logits and whose they are)
    sample(tokens, parameters, rules, Forward)  -> (tokens, results)

Everything that a step needs besides its plan is on the device already: the weights, the pool, and the batch
state with every row's tokens and block table. They are two jitted functions and not one because the first is
compiled once per bucket and takes seconds, while the second has variants (greedy, top-p, penalties, ...) and
compiles in a fraction of a second: apart, their numbers add; together, they would multiply.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jpaged.models.causal_lm import Capture
from jpaged.models.config import LayerGroups
from jpaged.models.layout import GroupedLayout, PagedLayout
from jpaged.models.sharding import POOL, split
from jpaged.runtime.sampler import logprobs
from jpaged.scheduling.plan import Bucket, split_packed
from pallas_kernels.block_copy import copy_blocks
from pallas_kernels.paged_attention import SharedPrefixes


class Forward(NamedTuple):
    """What the forward pass hands to the sampler: the plan's results, N = bucket.num_results."""

    logits: jax.Array  # float32 [N, V]
    rows: jax.Array  # int32 [N]: rows of the batch; the null row for padding
    positions: jax.Array  # int32 [N]: position of the token that these logits are for
    tile_hidden: jax.Array  # [P * C, E]: for prompt log-probabilities and embeddings
    tile_targets: jax.Array  # int32 [P * C]: the token after each of the tiles' tokens
    captured: jax.Array | None = None  # float32 [T, sites, layers, E], if activations are captured


class _Plan(NamedTuple):
    """`StepPlan.pack`'s integers, sliced apart on the device."""

    rows: jax.Array  # int32 [R]
    positions: jax.Array  # int32 [R]
    new_blocks: jax.Array  # int32 [G, R]
    tile_rows: jax.Array  # int32 [P]
    tile_starts: jax.Array  # int32 [P]
    tile_lengths: jax.Array  # int32 [P]
    result_rows: jax.Array  # int32 [N]
    result_tokens: jax.Array  # int32 [N]
    copy_sources: jax.Array  # int32 [G * N]
    copy_destinations: jax.Array  # int32 [G * N]


def make_forward(
    model: nn.Module,
    groups: LayerGroups,
    block_size: int,
    tile_size: int,
    bucket: Bucket,
    capture: Capture | None = None,
) -> Callable:
    """The forward pass of one bucket, for `jax.jit(..., donate_argnums=(1, 2))`.

    Arguments: params (the Linen tree), pool, tables (int32 [rows, W * G]), tokens (int32 [rows, L]), packed (int32
    [bucket.packed_size(G)]). Returns (pool, tables, Forward).
    """
    num_decodes, num_groups = bucket.decode_rows, len(groups.windows)

    def forward(params, pool, tables: jax.Array, tokens: jax.Array, packed: jax.Array):
        decode_lane, prefill_lane, results, copies, num_copies, pieces = split_packed(packed, bucket, num_groups)
        plan = _Plan(decode_lane[0], decode_lane[1], decode_lane[2:], *prefill_lane, *results, *copies)
        null_row = tokens.shape[0] - 1
        copy = split(copy_blocks, (POOL, P(), P(), P()), POOL)
        pool = copy(pool, plan.copy_sources, plan.copy_destinations, num_copies[0])
        tables = _enter_blocks(tables, plan, block_size, num_groups)
        offsets = jnp.arange(tile_size)
        real = offsets < plan.tile_lengths[:, None]  # [P, C]
        tile_positions = plan.tile_starts[:, None] + jnp.where(real, offsets, 0)  # padding stays in range
        rows = jnp.concatenate([plan.rows, jnp.repeat(plan.tile_rows, tile_size)])  # [T]
        positions = jnp.concatenate([plan.positions, tile_positions.reshape(-1)])  # [T]
        # Padding of a tile writes to the null block, as padding rows do by their empty tables.
        written = jnp.concatenate([jnp.ones(num_decodes, jnp.int32), real.reshape(-1).astype(jnp.int32)])
        shared = SharedPrefixes(pieces[:, :-1], pieces[:, -1] * block_size) if len(pieces) else None

        def layout_of(group: int) -> PagedLayout:
            blocks = tables[rows, positions // block_size * num_groups + group]
            return PagedLayout(
                slots=(blocks * block_size + positions % block_size) * written,
                decode_tables=tables[plan.rows, group::num_groups],
                decode_lengths=jnp.where(plan.rows == null_row, 0, plan.positions + 1),
                prefill_tables=tables[plan.tile_rows, group::num_groups],
                prefill_starts=plan.tile_starts,
                prefill_lengths=plan.tile_lengths,
                decode_shared=shared if group == 0 else None,
            )

        layout = GroupedLayout(groups.places, [layout_of(group) for group in range(num_groups)])
        variables = {"params": params}
        arguments, captured = (tokens[rows, positions], positions, pool, layout), None
        if capture is None:
            hidden, pool = model.apply(variables, *arguments)
        else:
            (hidden, pool), seen = model.apply(variables, *arguments, mutable=["intermediates"])
            captured = capture.of(seen["intermediates"])
        return (
            pool,
            tables,
            Forward(
                logits=_logits(model, params, hidden[plan.result_tokens]),
                rows=plan.result_rows,
                positions=positions[plan.result_tokens] + 1,
                tile_hidden=hidden[num_decodes:],
                tile_targets=tokens[rows[num_decodes:], positions[num_decodes:] + 1],
                captured=captured,
            ),
        )

    return forward


def _logits(model: nn.Module, params, hidden: jax.Array) -> jax.Array:
    return model.apply({"params": params}, hidden, method="logits")  # type: ignore[return-value]  # no mutable state


def _enter_blocks(tables: jax.Array, plan: _Plan, block_size: int, groups: int) -> jax.Array:
    """Writes the decode lane's new blocks into the block tables: appended ones, and copies of shared ones."""
    index = plan.positions // block_size * groups + jnp.arange(groups)[:, None]  # [G, R]
    kept = tables[plan.rows, index]
    return tables.at[plan.rows, index].set(jnp.where(plan.new_blocks > 0, plan.new_blocks, kept))


def make_prompt_scores(model: nn.Module, tile_size: int, count: int) -> Callable:
    """Log-probabilities of a prompt's own tokens, for `jax.jit`: (params, Forward) -> int32 [P * C, columns].

    Works a tile at a time: the logits of all prompt positions together could exhaust memory.
    """

    def prompt_scores(params, forward: Forward) -> jax.Array:
        def of_tile(tile):
            hidden, targets = tile
            return logprobs(_logits(model, params, hidden), targets, count)

        hidden, targets = forward.tile_hidden, forward.tile_targets
        rows = jax.lax.map(of_tile, (hidden.reshape(-1, tile_size, hidden.shape[-1]), targets.reshape(-1, tile_size)))
        return rows.reshape(-1, rows.shape[-1])

    return prompt_scores


def pool_tiles(hidden: jax.Array, weights: jax.Array) -> jax.Array:
    """Each tile's part of its prompt's pooled hidden state: [P * C, E], float32 [P, C] -> float32 [P, E]."""
    tiles = hidden.reshape(*weights.shape, -1).astype(jnp.float32)
    # Hidden states of padding may be anything, also not a number.
    return jnp.where(weights[..., None] == 0, 0, weights[..., None] * tiles).sum(1)
