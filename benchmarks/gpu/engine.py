"""The engine with random weights on requests as long as ShareGPT's: tokens a second, and the host's share of a step.

First with all the memory there is; then with as few blocks as the paper's OPT-13B had of them, beside schedulers that
reserve a request's memory at once, as Orca does (section 6.1).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.part import Recorder, Skipped
from benchmarks.gpu.random_models import model_config, random_model

PROMPT_MEAN, OUTPUT_MEAN = 161.31, 337.99  # tokens: ShareGPT in the paper (arXiv 2309.06180, figure 11)
SPREAD = 1.0  # of the logarithm: an assumption, the paper gives histograms only
LONGEST = 2048
SCARCE_SLOTS = 15728
"""Of the paper's OPT-13B (table 1)."""
SYSTEMS = ("jpaged", "orca-oracle", "orca-max", "orca-pow2")
SEED = 0


def lengths(count: int, mean: float, longest: int, seed: int) -> list[int]:
    """Lengths from a log-normal distribution of this mean, cut to 1..longest (which lowers the mean a little)."""
    drawn = np.random.default_rng(seed).lognormal(math.log(mean) - SPREAD**2 / 2, SPREAD, count)
    return [int(n) for n in np.clip(np.round(drawn), 1, longest)]


def run(recorder: Recorder, _: str) -> None:
    """All requests at once, greedy, each to its own length; once to compile and once to measure."""
    try:
        from jpaged import LLMEngine
    except ImportError as error:
        raise Skipped(f"the engine needs what is not installed: {error}") from error
    from benchmarks.engine import replay

    dry = recorder.dry_run
    count = 4 if dry else 256
    longest = 32 if dry else LONGEST // 2
    prompts = lengths(count, PROMPT_MEAN / (10 if dry else 1), longest, SEED)
    outputs = lengths(count, OUTPUT_MEAN / (40 if dry else 1), longest - 1, SEED + 1)
    config, parts = _parts(dry, max_num_seqs=4 if dry else 256, max_model_len=64 if dry else LONGEST)
    engine = LLMEngine(config, components=parts)
    rng = np.random.default_rng(SEED)
    vocabulary = engine.model_config.vocab_size
    requests = [
        {"prompt_token_ids": rng.integers(0, vocabulary, prompt).tolist(), "max_tokens": output}
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
    about = {"requests": count, "prompt tokens": sum(prompts), "output tokens": sum(outputs)}
    recorder.case({"round": "warm-up"} | about, lambda: replay(engine, requests)[0])
    engine.blocks.reset_prefix_cache()
    recorder.case({"round": "measured"} | about, lambda: replay(engine, requests)[0])
    few, slots = requests[: max(count // 4, 2)], 160 if dry else SCARCE_SLOTS
    for label, system in (("warm-up, few slots", SYSTEMS[0]), *zip(SYSTEMS, SYSTEMS, strict=True)):
        row = {"round": label, "requests": len(few), "slots": slots}
        recorder.case(row, lambda system=system: replay(_scarce(config, parts, system, slots), few)[0])


def _scarce(config: Any, parts: Any, system: str, slots: int) -> Any:
    """An engine with the same runner, and another scheduler over fewer blocks."""
    from benchmarks.paper.systems import Settings, Shapes, make_scheduler
    from jpaged import LLMEngine
    from jpaged.startup import resolve_limits

    limits = resolve_limits(config, parts.model_config, parts.runner.spec.dtype)
    shapes = Shapes(config.max_num_seqs, limits.tile_size, limits.max_num_batched_tokens, limits.buckets)
    scheduler = make_scheduler(system, Settings(slots, config.block_size, config.max_model_len), shapes)
    return LLMEngine(config, components=dataclasses.replace(parts, scheduler=scheduler, blocks=scheduler.blocks))


def _parts(dry: bool, max_num_seqs: int, max_model_len: int) -> tuple[Any, Any]:
    """(Configuration, components) without a checkpoint: what `jpaged.startup.build` does after loading one."""
    from jpaged import EngineConfig
    from jpaged.memory import BlockManager
    from jpaged.runtime.kv_pool import KVPoolSpec
    from jpaged.runtime.runner import Runner
    from jpaged.scheduling import Scheduler
    from jpaged.startup import Components, resolve_limits

    config = EngineConfig(max_num_seqs=max_num_seqs, max_model_len=max_model_len, warmup=False)
    dtype = jnp.dtype(jnp.bfloat16)
    model = model_config("llama-3-8b", tiny=dry).for_length(max_model_len)
    limits = resolve_limits(config, model, dtype)
    module, params = random_model(model, dtype)
    spec = KVPoolSpec.of(model, dtype, 2, config.block_size)
    runner = Runner(
        module,
        params,
        model,
        spec,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        tile_size=limits.tile_size,
    )
    width = -(-max_model_len // config.block_size)
    num_blocks = _num_blocks(spec, max_num_seqs * width + 1)
    runner.allocate(num_blocks)
    blocks = BlockManager(num_blocks, config.block_size, max_num_seqs, width)
    scheduler = Scheduler(
        blocks,
        limits.buckets,
        tile_size=limits.tile_size,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        swap_blocks=0,
    )
    parts: dict[str, Any] = {"blocks": blocks, "scheduler": scheduler, "runner": runner, "tokenizer": None}
    components = Components(
        model_config=model, generation_config={}, eos_token_ids=frozenset(), max_model_len=max_model_len, **parts
    )
    return config, components


def _num_blocks(spec, useful: int) -> int:
    """Seven tenths of the memory that is free: a step needs the rest at most."""
    memory = jax.devices()[0].memory_stats() or {}
    free = memory.get("bytes_limit", 1 << 28) - memory.get("bytes_in_use", 0)
    return min(useful, int(0.7 * free) // spec.block_bytes)
