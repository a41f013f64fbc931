"""Runs models on simulated devices, and prints what was seen as JSON: what `test_tensor_parallel.py` looks at.

JAX makes its devices when it starts, so this is a process of its own:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.runtime.tensor_parallel_runs
"""

import json
import re

import jax
import numpy as np

from jpaged import LLM, SamplingParams
from jpaged.config import EngineConfig
from jpaged.errors import InvalidConfigError
from jpaged.models.config import config_from_hf
from jpaged.models.registry import build
from jpaged.source import on_disk
from tests.engine.support import GOLDENS

GOLDEN_MODELS = sorted(path.parent.name for path in (GOLDENS / "models").glob("*/reference.npz"))
SIZES = {name: (2, 4)[index % 2] for index, name in enumerate(GOLDEN_MODELS)}
"""Four query heads each, and one, two or four KV heads: both sizes meet all of these."""
SMALL = {
    "max_num_seqs": 4,
    "max_model_len": 96,
    "max_num_batched_tokens": 4 + 8,
    "prefill_tile_size": 8,
    "block_size": 4,
    "num_gpu_blocks_override": 120,
    "warmup": False,
}
COLLECTIVES = r"= ([^=]*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def pool_pointers(llm: LLM) -> list[int]:
    leaves = jax.tree.leaves(llm.engine.runner.pool)
    return [shard.data.unsafe_buffer_pointer() for leaf in leaves for shard in leaf.addressable_shards]


def collectives(compiled) -> list[tuple[str, int]]:
    """What a step communicates: each operation with the number of its result's elements."""
    found = []
    for shapes, operation in re.findall(COLLECTIVES, compiled.as_text()):
        sizes = [np.prod([int(n) for n in dims.split(",") if n]) for dims in re.findall(r"\[([\d,]*)\]", shapes)]
        found.append((operation, int(sum(sizes))))
    return found


def golden(name: str, size: int) -> dict:
    """Both prompts at once, in chunks, against Hugging Face's greedy tokens."""
    llm = LLM(model=str(GOLDENS / "models" / name), tensor_parallel_size=size, **SMALL)
    llm.engine.scheduler.buckets = llm.engine.scheduler.buckets[-1:]  # both lanes: one shape to compile
    runner, reference = llm.engine.runner, np.load(GOLDENS / "models" / name / "reference.npz")
    wanted = [reference[f"{p}_greedy_ids"].tolist() for p in ("p0", "p1")]
    before = pool_pointers(llm)
    outputs = llm.generate(
        [{"prompt_token_ids": reference[f"{p}_input_ids"].tolist()} for p in ("p0", "p1")],
        [SamplingParams(temperature=0, max_tokens=len(w), ignore_eos=True, detokenize=False) for w in wanted],
    )
    forwards = [compiled for key, compiled in runner._compiled.items() if key[0] == "forward"]
    leaves = jax.tree.leaves(runner.params)
    return {
        "size": size,
        "wanted": wanted,
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "layers": llm.engine.model_config.num_hidden_layers,
        "stays": pool_pointers(llm) == before,
        "heads": [runner.spec.num_kv_heads, runner.pool[0].addressable_shards[0].data.shape[2]],
        "collectives": [collectives(compiled) for compiled in forwards],
        "layer_elements": int(np.prod(runner.spec.layer_shape)) // size,
        "temporary": max(compiled.memory_analysis().temp_size_in_bytes for compiled in forwards),
        "aliased": min(compiled.memory_analysis().alias_size_in_bytes for compiled in forwards),
        "device_pool_bytes": runner.spec.num_blocks * runner.spec.device_block_bytes,
        "param_bytes": sum(leaf.nbytes for leaf in leaves),
        "device_param_bytes": sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves),
    }


def everything_at_once(size: int, kv_cache_dtype: str = "auto") -> dict:
    """Samples, beams and copy-on-write in a pool that is too small, so that groups are swapped."""
    settings = {**SMALL, "num_gpu_blocks_override": 26, "max_num_seqs": 8, "max_num_batched_tokens": 8 + 16}
    settings["kv_cache_dtype"] = kv_cache_dtype
    llm = LLM(model=str(GOLDENS / "models" / "llama"), tensor_parallel_size=size, **settings)
    before = pool_pointers(llm)
    samples = SamplingParams(n=3, temperature=0.8, seed=1, max_tokens=20, ignore_eos=True, logprobs=0, detokenize=False)
    beams = SamplingParams(n=3, use_beam_search=True, temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    greedy = SamplingParams(temperature=0, max_tokens=16, prompt_logprobs=2, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": [5 + 3 * i + j % 7 for j in range(21)]} for i in range(4)]
    outputs = llm.generate(prompts, [samples, beams, samples, greedy])
    return {
        "tokens": [[list(completion.token_ids) for completion in output.outputs] for output in outputs],
        "swaps": llm.engine.scheduler.num_swaps_in,
        "copies": llm.engine.blocks.num_copies,
        "stays": pool_pointers(llm) == before,
    }


def eight_heads(size: int) -> list[int]:
    """A Llama with random weights and eight heads, whose tree is served as it is."""
    settings = json.loads((GOLDENS / "models" / "llama" / "config.json").read_text())
    config = config_from_hf({**settings, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8})
    tokens = np.zeros((1, 1), np.int32)
    params = build(config, np.dtype("float32")).init(jax.random.key(0), tokens, method="forward_logits")["params"]
    llm = LLM(model=config, params=params, tensor_parallel_size=size, **SMALL)
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    return list(llm.generate({"prompt_token_ids": list(range(3, 22))}, greedy)[0].outputs[0].token_ids)


def pointers(params) -> list[int]:
    return [shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]


def weights(size: int) -> dict:
    """Read to their devices, served where they are, and replaced: by a tree on the host, and by one on the mesh."""
    config = EngineConfig(model=str(GOLDENS / "models" / "llama"), tensor_parallel_size=size, **SMALL)
    loaded = on_disk(config).load(np.dtype("float32"))
    llm = LLM(model=loaded, tensor_parallel_size=size, **SMALL)
    placed = size > 1 and pointers(loaded.params) == pointers(llm.params)
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)

    def tokens() -> list[int]:
        [output] = llm.generate({"prompt_token_ids": list(range(3, 22))}, greedy)
        return list(output.outputs[0].token_ids)

    said, where = [tokens()], [leaf.sharding for leaf in jax.tree.leaves(llm.params)]
    programs = len(llm.engine.runner._compiled)
    llm.update_weights(jax.tree.map(lambda leaf: np.asarray(leaf) * 1.5, loaded.params))
    said.append(tokens())
    trained = jax.tree.map(lambda leaf: leaf * 1.5, llm.params)
    llm.update_weights(trained)
    said.append(tokens())
    return {
        "tokens": said,
        "placed": placed,
        "no copy": pointers(trained) == pointers(llm.params),
        "stays": where == [leaf.sharding for leaf in jax.tree.leaves(llm.params)],
        "compiled": len(llm.engine.runner._compiled) - programs,
    }


def refusals() -> list[str]:
    said = []
    for size in (3, 8, 16):
        try:
            LLM(model=str(GOLDENS / "models" / "llama"), tensor_parallel_size=size, **SMALL)
        except InvalidConfigError as error:
            said.append(str(error))
    return said


if __name__ == "__main__":
    print(
        json.dumps(
            {
                "models": {name: golden(name, size) for name, size in SIZES.items()},
                "everything": {size: everything_at_once(size) for size in (1, 2)},
                "quantized": {size: everything_at_once(size, "int8") for size in (1, 2)},
                "weights": {size: weights(size) for size in (1, 2)},
                "eight": {size: eight_heads(size) for size in (1, 8)},
                "refusals": refusals(),
            }
        )
    )
