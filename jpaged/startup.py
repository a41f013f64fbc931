"""From an `EngineConfig` to the parts of an engine: load, size the memory, compile.

source -> checkpoint -> model, device parameters -> limits -> pool size -> block manager, scheduler, runner -> warm-up
"""

import concurrent.futures
import dataclasses
import functools
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import checkpoints
from jpaged.config import SMALLEST_TILE, EngineConfig
from jpaged.errors import InvalidConfigError
from jpaged.memory import BlockManager
from jpaged.models.batch_invariant import SPAN
from jpaged.models.config import ModelConfig
from jpaged.models.dense import with_kernels
from jpaged.models.rope import max_trained_length
from jpaged.models.sharding import param_shardings, shard_params, tensor_mesh
from jpaged.progress import Progress
from jpaged.runtime import compile_cache
from jpaged.runtime.host_memory import keep_freed_memory
from jpaged.runtime.kv_pool import (
    KVPoolSpec,
    available_host_memory,
    blocks_in_budget,
    cpu_budget,
    pool_dtype,
    stable_blocks,
    swap_blocks,
)
from jpaged.runtime.runner import Runner
from jpaged.scheduling import Bucket, Scheduler, Variant
from jpaged.scheduling.ngrams import NgramSpeculator
from jpaged.scheduling.plan import make_buckets
from jpaged.scheduling.sharing import MEMBERS
from jpaged.source import Source, ToLinen, on_disk

if TYPE_CHECKING:
    from jpaged.tokenization import Tokenizer

log = logging.getLogger("jpaged")

_DEFAULT_MODEL_LEN = 8192
WARM_VARIANTS = (Variant(), Variant(sample=True))
"""Samplers that are compiled before the first request; the others when they are first needed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """The engine's sizes after defaults have been filled in."""

    dtype: jnp.dtype
    max_model_len: int
    max_num_seqs: int
    tile_size: int
    max_num_batched_tokens: int
    buckets: tuple[Bucket, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Components:
    """The parts that `LLMEngine` drives."""

    model_config: ModelConfig
    tokenizer: "Tokenizer | None"
    generation_config: dict[str, Any]
    eos_token_ids: frozenset[int]
    max_model_len: int
    blocks: BlockManager
    scheduler: Scheduler
    runner: Runner
    to_linen: ToLinen | None = None
    """See `jpaged.source.live`."""


def build(config: EngineConfig, source: Source | None = None) -> Components:
    """Loads the model and makes everything ready to run.

    Args:
      source: where the model comes from; None: from disk, as the configuration says.

    Raises:
      checkpoints.CheckpointError: the model can't be loaded.
      InvalidConfigError: arguments that contradict the model or each other.
      OutOfMemoryError: the memory budget is too small.
    """
    compile_cache.enable(config.compilation_cache_dir)
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    source = source or on_disk(config)
    dtype = _dtype(config, source)
    checkpoint = source.load(dtype)
    limits = resolve_limits(config, checkpoint.config, dtype)
    checkpoint = dataclasses.replace(checkpoint, config=checkpoint.config.for_length(limits.max_model_len))
    runner = _make_runner(config, source, checkpoint, limits)
    num_blocks = _num_blocks(config, limits, runner)
    runner.allocate(num_blocks)
    blocks = BlockManager(
        num_blocks,
        config.block_size,
        limits.max_num_seqs,
        -(-limits.max_model_len // config.block_size),
        watermark=config.watermark,
        enable_prefix_caching=config.enable_prefix_caching,
        windows=runner.spec.groups.windows,
        max_chunk=max(bucket.prefill_tiles for bucket in limits.buckets) * limits.tile_size,
    )
    scheduler = Scheduler(
        blocks,
        limits.buckets,
        tile_size=limits.tile_size,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        swap_blocks=swap_blocks(config.swap_space, available_host_memory(), runner.spec),
        preemption_mode=config.preemption_mode,
        speculator=_speculator(config),
    )
    log.info(
        "KV cache: %d blocks of %d tokens, %.0f MiB; %d step shapes",
        num_blocks,
        config.block_size,
        runner.spec.num_bytes / 2**20,
        len(limits.buckets),
    )
    if config.warmup:
        warm_up(runner, limits.buckets)
    return Components(
        model_config=checkpoint.config,
        tokenizer=checkpoint.tokenizer,
        generation_config=checkpoint.generation_config,
        eos_token_ids=frozenset(checkpoint.config.eos_token_ids),
        max_model_len=limits.max_model_len,
        blocks=blocks,
        scheduler=scheduler,
        runner=runner,
        to_linen=source.to_linen,
    )


def _make_runner(config: EngineConfig, source: Source, checkpoint: checkpoints.Checkpoint, limits: Limits) -> Runner:
    """The device side, parameters in their places; its pool is still to be allocated."""
    module = _module(config, source, checkpoint.config, limits.dtype)
    mesh = tensor_mesh(config.tensor_parallel_size, checkpoint.config)
    if mesh is None:
        params = jax.device_put(checkpoint.params)
    else:
        params = shard_params(with_kernels(checkpoint.params), param_shardings(checkpoint.config, mesh))
    kept_as = pool_dtype(config.kv_cache_dtype, checkpoint.config, limits.dtype)
    return Runner(
        module,
        params,
        checkpoint.config,
        KVPoolSpec.of(
            checkpoint.config,
            kept_as,
            2,
            config.block_size,
            mesh,
            checkpoint.config.layer_groups(limits.max_model_len),
        ),
        max_num_seqs=limits.max_num_seqs,
        max_model_len=limits.max_model_len,
        tile_size=limits.tile_size,
    )


def _module(config: EngineConfig, source: Source, model: ModelConfig, dtype: jnp.dtype) -> nn.Module:
    module = source.module(model, dtype)
    if not (config.batch_invariant or module.batch_invariant):
        return module
    dataclasses.replace(config, batch_invariant=True)  # raises if a module that is has arguments that contradict it
    if SPAN % config.block_size:
        raise InvalidConfigError(f"batch_invariant needs a block_size that divides {SPAN}, not {config.block_size}.")
    return module.clone(batch_invariant=True)


def resolve_limits(config: EngineConfig, model: ModelConfig, dtype: jnp.dtype) -> Limits:
    """Fills in the defaults, which depend on the device and the model."""
    on_cpu = jax.default_backend() == "cpu"
    longest = max_trained_length(model)
    max_model_len = config.max_model_len or min(longest, _DEFAULT_MODEL_LEN)
    if max_model_len > longest:
        raise InvalidConfigError(
            f"max_model_len={max_model_len} is beyond the {longest} tokens that the model was "
            "trained for: positions past them are meaningless."
        )
    seqs = config.max_num_seqs or (32 if on_cpu else 256)
    speculative: Any = config.speculative_config  # `SpeculativeConfig`, once checked
    lanes = seqs if speculative is None else max(seqs, 1 + speculative.num_speculative_tokens)
    tile = config.prefill_tile_size or default_tile_size(jax.default_backend(), model)
    batched = config.max_num_batched_tokens or (512 + lanes if on_cpu else 2048 + lanes)
    # The prefill lane takes what the longest decode lane leaves, and one tile at least.
    tiles = max(1, min(batched - lanes, -(-max_model_len // tile) * tile * seqs) // tile)
    batched = max(batched, tiles * tile + lanes)
    return Limits(
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=seqs,
        tile_size=tile,
        max_num_batched_tokens=batched,
        # XLA:CPU gains by longer products, while a GPU's kernel keeps a piece's queries in registers.
        buckets=make_buckets(lanes, tiles, tile, piece_members=16 if on_cpu else MEMBERS),
    )


def default_tile_size(platform: str, model: ModelConfig) -> int:
    """Tokens of a tile. A prefill kernel's product has 128 rows: queries, times the heads that share keys.

    On CPU products need fewer rows, and tiles that end with their prompts waste less.
    """
    if platform == "cpu":
        return SMALLEST_TILE
    return 128 if model.cache_shape[1] == model.num_attention_heads else 64


def warm_up(runner: Runner, buckets: tuple[Bucket, ...]) -> None:
    """Compiles every step shape with a progress bar and an estimate of the time left."""
    jobs: list[Callable[[], Any]] = [functools.partial(runner.compile_forward, bucket) for bucket in buckets]
    jobs += [functools.partial(runner.compile_sample, b, variant) for b in buckets for variant in WARM_VARIANTS]
    with (
        Progress("compiling steps", total=len(jobs)) as progress,
        concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool,
    ):
        # XLA compiles, and loads what is in the cache, without holding the interpreter.
        for done in concurrent.futures.as_completed([pool.submit(job) for job in jobs]):
            done.result()
            progress.advance()


def _dtype(config: EngineConfig, source: Source) -> jnp.dtype:
    if config.dtype == "auto":
        return source.dtype or jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return jnp.dtype(config.dtype)


def _speculator(config: EngineConfig) -> NgramSpeculator | None:
    speculative: Any = config.speculative_config  # `SpeculativeConfig`, once checked
    if speculative is None:
        return None
    return NgramSpeculator(
        speculative.num_speculative_tokens, speculative.prompt_lookup_max, speculative.prompt_lookup_min
    )


def _num_blocks(config: EngineConfig, limits: Limits, runner: Runner) -> int:
    """Blocks of the pool, the null block included."""
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override + 1
    logical = limits.max_num_seqs * -(-limits.max_model_len // config.block_size)
    useful = logical * len(runner.spec.groups.windows) + 1
    if config.kv_cache_memory_bytes is not None:
        return blocks_in_budget(config.kv_cache_memory_bytes, runner.spec, useful)
    if jax.default_backend() == "cpu":
        budget = cpu_budget(available_host_memory()) // config.tensor_parallel_size  # its devices are one machine
        return blocks_in_budget(budget, runner.spec, useful)
    return stable_blocks(blocks_in_budget(_gpu_budget(config, limits, runner), runner.spec, useful))


def _gpu_budget(config: EngineConfig, limits: Limits, runner: Runner) -> int:
    """What is left of each GPU's share after what is there and what the largest step needs, by XLA's own count."""
    mesh = runner.spec.mesh
    memories = [device.memory_stats() or {} for device in (jax.local_devices()[:1] if mesh is None else mesh.devices)]
    step = 0
    for bucket in limits.buckets[-2:]:
        analysis = runner.compile_forward(bucket).memory_analysis()
        step = max(step, analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
    share = config.gpu_memory_utilization
    left = min(int(m.get("bytes_limit", 0) * share) - m.get("bytes_in_use", 0) for m in memories)
    return left - step
