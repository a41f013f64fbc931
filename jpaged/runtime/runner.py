"""Runner: owns the device's memory and launches the steps.

    prepare(plan)      moves swapped blocks (waits for them, and measures) and edits rows
    admit(sequence)    uploads an admitted sequence's row
    forward(plan)      copies blocks, computes logits; nothing is waited for
    sample(plan, ...)  chooses tokens; with the masks of grammars, which the host may make meanwhile
    StepResult.read    waits for that step and gives its small result arrays

Steps run on the device in the order of their launches, and each takes the pool and the batch state that the one
before it returned (donated: updated in place).
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jpaged.models.causal_lm import Capture
from jpaged.models.config import ModelConfig
from jpaged.runtime import state as batch
from jpaged.runtime.beam_selection import pack_searches, packed_size, unpack_candidates
from jpaged.runtime.kv_pool import KVPoolSpec
from jpaged.runtime.pieces import Pieces
from jpaged.runtime.sampler import sample
from jpaged.runtime.step import Forward, make_forward, make_prompt_scores, pool_tiles
from jpaged.runtime.swapping import Swapper
from jpaged.scheduling.beams import Candidates
from jpaged.scheduling.plan import Bucket, StepPlan, Variant
from jpaged.sequence import Sequence
from pallas_kernels.paged_attention import KV

Params = dict[str, Any]

EDITS = 32
"""Edits of rows are padded to a multiple of this."""


class Results(NamedTuple):
    """What a step brings to the host."""

    tokens: np.ndarray  # int32 [N, columns]: the plan's results, as `sampler.sample` returns them
    candidates: Candidates | None
    prompt_scores: np.ndarray | None  # int32 [P * C, columns]
    pooled: np.ndarray | None  # float32 [P, E]: each tile's part of its prompt's embedding


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """The results of a launched step, still on the device or on their way."""

    plan: StepPlan
    results: jax.Array
    candidates: jax.Array | None
    prompt_scores: jax.Array | None
    pooled: jax.Array | None

    def read(self) -> Results:
        """Waits for the step."""
        return Results(
            np.asarray(self.results),
            None if self.candidates is None else unpack_candidates(np.asarray(self.candidates)),
            None if self.prompt_scores is None else np.asarray(self.prompt_scores),
            None if self.pooled is None else np.asarray(self.pooled),
        )


class Runner:
    """The device side of an engine.

    Args:
      model: a module as `jpaged.models` describes it.
      params: its parameters, device arrays; on the pool's mesh, if it has one.
      config: the model's configuration.
      pool: the pool's shape, and the mesh that everything is on.
      max_num_seqs: rows of the batch.
      max_model_len: most tokens of a sequence.
      tile_size: tokens of a tile of the prefill lane.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Params,
        config: ModelConfig,
        pool: KVPoolSpec,
        *,
        max_num_seqs: int,
        max_model_len: int,
        tile_size: int,
    ) -> None:
        self.model = model
        self.spec = pool
        self.tile_size = tile_size
        self.max_model_len = max_model_len
        self._vocab_size = config.vocab_size
        self._null_row = max_num_seqs
        self._leaves, self._treedef = jax.tree.flatten(params)
        self._in_pieces = jax.default_backend() == "cpu" and pool.mesh is None
        self._compiled: dict[tuple, Any] = {}
        table_width = -(-max_model_len // pool.block_size) * len(pool.groups.windows)
        self._make_state = functools.partial(batch.empty, max_num_seqs, max_model_len, table_width, config.vocab_size)
        self.on_compile: Callable[[tuple], contextlib.AbstractContextManager] = contextlib.nullcontext
        """Entered with the key of a program while it is compiled: for whoever shows what is going on."""
        self.on_missing: Callable[[Bucket, Variant], None] | None = None
        """If set, steps take a wider sampler where there is one, and tell of the one that they lack."""
        self.capture: Capture | None = None
        """Activations that steps return from now on."""
        self.on_captured: Callable[[StepPlan, jax.Array], None] = lambda plan, captured: None
        """Called with a launched step's, float32 [tokens of the bucket, sites, layers, E], on their way."""
        self.pool: tuple[KV, ...] = ()
        self.state = jax.eval_shape(self._make_state)
        self._everywhere = None if pool.mesh is None else NamedSharding(pool.mesh, PartitionSpec())
        on_rows = functools.partial(jax.jit, donate_argnums=0, out_shardings=self._everywhere)
        self._admit, self._set_rules, self._edit = on_rows(batch.admit), on_rows(batch.set_rules), on_rows(batch.edit)

    def allocate(self, num_blocks: int) -> None:
        """Makes the pool and the batch state."""
        self.spec = dataclasses.replace(self.spec, num_blocks=num_blocks)
        self.pool = self.spec.allocate()
        self.swapper = Swapper(self.spec.block_bytes, jax.tree.leaves(self.pool)[0].sharding)
        self.state = jax.jit(self._make_state, out_shardings=self._everywhere)()

    @property
    def params(self) -> Params:
        """What is served. Set it to a tree of the same shapes, dtypes and places: no step is compiled again for it."""
        return jax.tree.unflatten(self._treedef, self._leaves)

    @params.setter
    def params(self, params: Params) -> None:
        self._leaves = jax.tree.leaves(params)

    # ----------------------------------------------------------------------------------------------- compile

    def compile_forward(self, bucket: Bucket) -> Any:
        """The compiled forward pass of a bucket; compiled, or found in the persistent cache, once."""
        key = ("forward", bucket) if self.capture is None else ("forward", bucket, self.capture)
        if key in self._compiled:  # every step asks, and what `_compile` is told takes a millisecond to make
            return self._compiled[key]
        groups = self.spec.groups
        packed = jax.ShapeDtypeStruct((bucket.packed_size(len(groups.windows)),), jnp.int32)
        forward = make_forward(self.model, groups, self.spec.block_size, self.tile_size, bucket, self.capture)

        # A flat list of leaves goes through dispatch twice as fast as a nested tree.
        def flat_forward(leaves, *rest):
            return forward(jax.tree.unflatten(self._treedef, leaves), *rest)

        return self._compile(
            key,
            flat_forward,
            (1, 2),
            (self.spec.sharding, self._everywhere, self._everywhere),
            self._leaves,
            self.spec.abstract(),
            self.state.tables,
            self.state.tokens,
            packed,
            in_pieces=self._in_pieces,
        )

    def compile_sample(self, bucket: Bucket, variant: Variant) -> Any:
        """The compiled sampler for a bucket's number of results."""
        n, variant = bucket.num_results, variant._replace(prompt_logprobs=False)
        key = ("sample", n, variant)
        if key in self._compiled:
            return self._compiled[key]
        one = jax.ShapeDtypeStruct((n,), jnp.int32)
        logits = jax.ShapeDtypeStruct((n, self._vocab_size), jnp.float32)
        return self._compile(
            key,
            functools.partial(sample, variant=variant),
            (0,),
            self._everywhere,
            self.state.tokens,
            self.state.parameters,
            self.state.rules,
            logits,
            one,
            one,
            jax.ShapeDtypeStruct((packed_size(n, variant.num_beam_candidates),), jnp.int32),
            jax.ShapeDtypeStruct((n, -(-self._vocab_size // 32)), jnp.uint32) if variant.structured else None,
        )

    def widened(self, plan: StepPlan) -> StepPlan:
        """The plan; if its sampler is not compiled and `on_missing` is set, with the least of those that do as much.

        What a sampler does beyond what is asked for is neutral for all rows.
        """
        n, wanted = plan.bucket.num_results, plan.variant._replace(prompt_logprobs=False)
        if self.on_missing is None or ("sample", n, wanted) in self._compiled:
            return plan
        fixed = (wanted.structured, wanted.num_beam_candidates)
        known = [key[2] for key in list(self._compiled) if key[:2] == ("sample", n)]
        wider = [v for v in known if v.covers(wanted) and (v.structured, v.num_beam_candidates) == fixed]
        if not wider:
            return plan
        self.on_missing(plan.bucket, wanted)
        least = min(wider, key=sum)
        return dataclasses.replace(plan, variant=least._replace(prompt_logprobs=plan.variant.prompt_logprobs))

    def _compile(
        self,
        key: tuple,
        function: Callable,
        donated: tuple[int, ...],
        out_shardings: Any,
        *arguments: Any,
        in_pieces: bool = False,
    ) -> Any:
        if key not in self._compiled:
            jitted = jax.jit(function, donate_argnums=donated, out_shardings=out_shardings)
            with self.on_compile(key), self._mesh_in_scope():
                traced = jitted.trace(*jax.tree.map(self._abstract, arguments))
                self._compiled[key] = Pieces(traced) if in_pieces else traced.lower().compile()
        return self._compiled[key]

    def _mesh_in_scope(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.spec.mesh is None else jax.set_mesh(self.spec.mesh)

    def _abstract(self, x: Any) -> jax.ShapeDtypeStruct:
        """Shape and dtype of an argument, and where on the mesh it is: on every device, if nothing is said."""
        sharding = None if self.spec.mesh is None else x.sharding or self._everywhere
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    # ------------------------------------------------------------------------------------------------ launch

    def admit(self, sequence: Sequence, table: np.ndarray, bad_words: list[list[int]]) -> None:
        """Uploads an admitted sequence's tokens, block table [W * G] and sampling parameters to its row."""
        self.state = self._admit(self.state, batch.pack_admission(sequence, table, self.max_model_len))
        if sequence.group.params.needs_rules:
            rules = batch.rules_of(sequence, self._vocab_size, bad_words)
            self.state = self._set_rules(self.state, np.int32(sequence.row), rules)

    def prepare(self, plan: StepPlan) -> None:
        """Swaps blocks out and in, and edits rows, as a plan wants it before its sequences are admitted."""
        for swapped in plan.swaps_out:
            swapped.contents = self.swapper.swap_out(self.pool, swapped.blocks)
        for swapped, indices, blocks in plan.swaps_in:
            self.pool = self.swapper.swap_in(self.pool, swapped.contents, indices, blocks)
        if plan.edits:
            size = EDITS * -(-max(len(plan.edits.forks), len(plan.edits.tokens)) // EDITS)
            self.state = self._edit(self.state, batch.pack_edits(plan.edits, size, self._null_row))

    def forward(self, plan: StepPlan) -> Forward:
        """Puts the forward pass of a step on the device's queue, after `prepare`, and `admit` of each of the plan's
        admitted sequences."""
        run_forward, state = self.compile_forward(plan.bucket), self.state
        self.pool, tables, forward = run_forward(
            self._leaves, self.pool, state.tables, state.tokens, plan.pack(self._null_row)
        )
        self.state = state._replace(tables=tables)
        if forward.captured is not None:
            self.on_captured(plan, forward.captured)
        return forward._replace(captured=None)

    def sample(self, plan: StepPlan, forward: Forward, masks: np.ndarray | None = None) -> StepResult:
        """Puts the rest of that step on the device's queue.

        Args:
          masks: uint32 [N, ceil(V / 32)], a bit for each token that a result may be; given if the plan is `structured`.
        """
        run_sample, state = self.compile_sample(plan.bucket, plan.variant), self.state
        tokens, results, candidates = run_sample(
            state.tokens, state.parameters, state.rules, *forward[:3], pack_searches(plan), masks
        )
        self.state = state._replace(tokens=tokens)
        results.copy_to_host_async()
        return StepResult(
            plan,
            results,
            candidates if plan.beams else None,
            self._score_prompts(plan.variant, forward),
            self._pool_prompts(plan, forward),
        )

    def _score_prompts(self, variant: Variant, forward: Forward) -> jax.Array | None:
        if not variant.prompt_logprobs:
            return None
        scores = make_prompt_scores(self.model, self.tile_size, variant.num_logprobs)

        def flat_scores(leaves, forward):
            return scores(jax.tree.unflatten(self._treedef, leaves), forward)

        key = ("prompt", forward.tile_targets.shape, variant.num_logprobs)
        return self._compile(key, flat_scores, (), self._everywhere, self._leaves, forward)(self._leaves, forward)

    def _pool_prompts(self, plan: StepPlan, forward: Forward) -> jax.Array | None:
        weights = plan.pooling_weights(self.tile_size)
        if weights is None:
            return None
        hidden, abstract = forward.tile_hidden, jax.ShapeDtypeStruct(weights.shape, weights.dtype)
        key = ("pool", hidden.shape)
        return self._compile(key, pool_tiles, (), self._everywhere, hidden, abstract)(hidden, weights)
