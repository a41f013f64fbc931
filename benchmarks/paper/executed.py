"""The paper's systems on a real model: the same runner, weights and requests, one scheduler after the other.

    python -m benchmarks.paper.executed --traces FOLDER [--output FILE.json] [--requests 256]

First the systems of figure 12a under overload: all requests wait from the start, greedy, outputs forced to their
lengths, and what is measured ends when the last request has been admitted, so that the pool was never idle. Then what
sharing saves, over whole runs, when samples and beams are those of the model itself (figure 15). ShareGPT's
lengths and OPT-13B's pool of 15,728 slots are divided by `--scale`, the block size too; Alpaca's are short enough as
they are.
"""

import argparse
import dataclasses
import itertools
import json
import time
from pathlib import Path

import numpy as np

from benchmarks.paper import traces
from benchmarks.paper.cost import MODELS
from benchmarks.paper.figures.base import LABELS
from benchmarks.paper.memory_use import MemoryUse
from benchmarks.paper.published import CAPACITY, FIG13, FIG15
from benchmarks.paper.systems import SYSTEMS, Settings, Shapes, make_scheduler
from jpaged import EngineConfig, LLMEngine, SamplingParams
from jpaged.startup import Components, build, resolve_limits

MAX_ROWS = 64
TEXT = Path(__file__).parents[2] / "README.md"
"""Prompts are pieces of it: what the samples and beams share depends on the model, which wants words."""


@dataclasses.dataclass(frozen=True)
class Load:
    """Requests that all wait from the start, and what they are given."""

    prompts: list[list[int]]
    outputs: list[int]
    settings: Settings
    n: int = 1
    beam: bool = False

    def params(self, output: int, seed: int) -> SamplingParams:
        """Parallel samples are drawn at temperature 1, the rest is greedy, as in the paper's benchmark."""
        temperature = 1.0 if self.n > 1 and not self.beam else 0.0
        return SamplingParams(
            n=self.n,
            use_beam_search=self.beam,
            temperature=temperature,
            seed=seed,
            max_tokens=output,
            ignore_eos=True,
            detokenize=False,
        )


def make_load(data: str, folder: Path, tokenizer, count: int, scale: int, **how) -> Load:
    """The first requests of a data set, their lengths divided by `scale`; prompts are pieces of `TEXT`."""
    rng = np.random.default_rng(0)
    pairs = traces.load(folder, data)[:count]
    pairs = np.maximum(1, np.rint(pairs / scale)).astype(int)
    text = tokenizer.backend_tokenizer.encode(TEXT.read_text()).ids
    text *= 1 + 2048 // len(text)
    starts = rng.integers(0, len(text) - pairs[:, 0].max(), count)
    model = MODELS["opt-13b"]
    settings = Settings(
        slots=model.slots // scale,
        block_size=16 // scale,
        max_len=2048 // scale,
        ft_batch=model.ft_batch[data],
        swap_slots=model.slots // scale,
    )
    lengths, outputs = pairs.T.tolist()
    prompts = [text[start : start + length] for start, length in zip(starts.tolist(), lengths, strict=True)]
    return Load(prompts, outputs, settings, **how)


def execute(
    parts: Components, config: EngineConfig, system: str, load: Load, *, queued: bool
) -> tuple[dict[str, float], list]:
    """Runs a load under a system.

    Args:
      queued: measure as long as a request waits; otherwise all of the run.

    Returns: figures, and every request's tokens.
    """
    limits = resolve_limits(config, parts.model_config, parts.runner.spec.dtype)
    shapes = Shapes(limits.max_num_seqs, limits.tile_size, limits.max_num_batched_tokens, limits.buckets)
    scheduler = make_scheduler(system, load.settings, shapes)
    engine = LLMEngine(config, components=dataclasses.replace(parts, scheduler=scheduler, blocks=scheduler.blocks))
    for i, (prompt, output) in enumerate(zip(load.prompts, load.outputs, strict=True)):
        engine.add_request(f"{i}", {"prompt_token_ids": prompt}, load.params(output, seed=i))
    groups = list(scheduler.roster.waiting)
    use, batches = MemoryUse(0, np.inf), []
    start = end = time.perf_counter()
    made = 0
    finished = {}
    while engine.has_unfinished_requests():
        finished |= {output.request_id: output for output in engine.step() if output.finished}
        if scheduler.running and (scheduler.num_waiting or not queued):
            use(0, scheduler)
            batches.append(len(scheduler.running))
            end = time.perf_counter()
            made = sum(sequence.num_output_tokens for group in groups for sequence in group.sequences)
    figures = {"tokens_s": made / (end - start), "batch": float(np.mean(batches)), "steps": len(batches)}
    figures |= {key: use.means()[key] for key in ("tokens", "saved")}
    tokens = [[output.token_ids for output in finished[f"{i}"].outputs] for i in range(len(load.prompts))]
    return figures, tokens


def compare_systems(parts: Components, config: EngineConfig, load: Load) -> dict[str, dict[str, float]]:
    """All systems over one load, after one unmeasured run that compiles what they need."""
    execute(parts, config, "jpaged", load, queued=True)
    results, expected = {}, None
    for system in SYSTEMS:
        results[system], tokens = execute(parts, config, system, load, queued=True)
        expected = expected or tokens
        if tokens != expected:
            raise RuntimeError(f"{system} generated other tokens than {SYSTEMS[0]}")
        print(f"{system}: {results[system]}", flush=True)
    return results


def report(systems: dict[str, dict[str, float]], sharing: dict[str, dict[str, float]]) -> str:
    """Both tables, beside the paper's numbers."""
    paper = CAPACITY["fig12a"]
    lines = [
        "| system | tokens/s | jpaged over it | paper | mean batch | paper | pool holding tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in systems.items():
        batch = FIG13["sharegpt"].get(name, "")
        lines.append(
            f"| {LABELS[name]} | {row['tokens_s']:.0f} | {systems['jpaged']['tokens_s'] / row['tokens_s']:.2f} | "
            f"{paper['jpaged'] / paper[name]:.2f} | {row['batch']:.1f} | {batch} | {row['tokens']:.1%} |"
        )
    lines += ["", "| blocks saved by sharing | ours | paper |", "|---|---|---|"]
    for key, row in sharing.items():
        data, kind, n = key.split()
        value = FIG15[data, kind == "beam"].get(int(n))
        lines.append(f"| {key} | {row['saved']:.1%} | {'' if value is None else f'{value} %'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, help="folder of the traces (docs/paper.md names them)")
    parser.add_argument("--output", type=Path, help="results as JSON")
    parser.add_argument("--model", default="smollm2-135m")
    # Several times the largest batch: jpaged admits a pool full at once.
    parser.add_argument("--requests", type=int, default=256, help="for the systems; a sixth of them for sharing")
    parser.add_argument("--scale", type=int, default=4, choices=(2, 4, 8), help="divides ShareGPT's lengths")
    parser.add_argument(
        "--part", choices=("systems", "sharing"), help="only that table; sharing does not depend on time"
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 4, 6])
    args = parser.parse_args()

    def engine_parts(scale: int) -> tuple[Components, EngineConfig]:
        config = EngineConfig(
            model=args.model,
            max_num_seqs=MAX_ROWS,
            max_model_len=2048 // scale,
            block_size=16 // scale,
            num_gpu_blocks_override=MODELS["opt-13b"].slots // 16,
            warmup=False,
        )
        return build(config), config

    systems: dict[str, dict[str, float]] = {}
    sharing: dict[str, dict[str, float]] = {}
    for data, scale in (("sharegpt", args.scale), ("alpaca", 1)):
        parts, config = engine_parts(scale)
        if data == "sharegpt" and args.part != "sharing":
            load = make_load(data, args.traces, parts.tokenizer, args.requests, scale)
            systems = compare_systems(parts, config, load)
        for kind, n in () if args.part == "systems" else itertools.product(("parallel", "beam"), args.widths):
            count = max(args.requests // 6, 1)
            load = make_load(data, args.traces, parts.tokenizer, count, scale, n=n, beam=kind == "beam")
            sharing[f"{data} {kind} {n}"], _ = execute(parts, config, "jpaged", load, queued=False)
            print(f"{data} {kind} {n}: {sharing[f'{data} {kind} {n}']}", flush=True)
        del parts
    if args.output:
        args.output.write_text(json.dumps({"systems": systems, "sharing": sharing}, indent=1) + "\n")
    print(report(systems, sharing))


if __name__ == "__main__":
    main()
