"""Records who continues whom in beam searches of a real model, for the simulation to replay (`--beams`).

    python -m benchmarks.paper.record_beams PROMPTS.json OUT.json [--widths 2 4 6] [--max-tokens 256] [--requests 8]

PROMPTS is a list of {"prompt_token_ids": [...]}. The searches run in the engine, all prompts of one width together, and
ignore the end-of-sequence token as the paper's benchmark does.
"""

import argparse
import json
from pathlib import Path

from jpaged import LLMEngine, SamplingParams
from jpaged.sequence import SequenceGroup


def record(engine: LLMEngine, prompts: list[list[int]], width: int, max_tokens: int) -> list[list[list[int]]]:
    """Of each prompt and step: the ranks that the new beams, by rank, continue."""
    params = SamplingParams(n=width, use_beam_search=True, temperature=0, max_tokens=max_tokens, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        engine.add_request(f"{number}", {"prompt_token_ids": prompt}, params)
    steps: list[list[list[int]]] = [[] for _ in prompts]
    nodes: dict[SequenceGroup, list] = {}
    while engine.has_unfinished_requests():
        engine.step()
        for group in engine.scheduler.running:
            now, before = group.beams.nodes, nodes.get(group, [None] * width)
            if now != before:  # nodes are compared by identity
                steps[int(group.request_id)].append([_rank(node.parent, before) for node in now])
                nodes[group] = now
    return steps


def _rank(parent: object, before: list) -> int:
    return next(rank for rank, node in enumerate(before) if node is parent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--requests", type=int, default=8, help="how many of the prompts")
    arguments = parser.parse_args()
    prompts = [p["prompt_token_ids"] for p in json.loads(arguments.prompts.read_text())][: arguments.requests]
    rows = max(arguments.widths) * len(prompts)
    engine = LLMEngine(model=arguments.model, max_num_seqs=rows, max_model_len=1024, warmup=False)
    recordings = []
    for width in arguments.widths:
        requests = record(engine, prompts, width, arguments.max_tokens)
        recordings.append({"width": width, "requests": requests})
        forks = [width - len(set(parents)) for steps in requests for parents in steps[1:]]
        print(f"width {width}: {len(requests)} searches, {sum(forks) / len(forks):.3f} forks a step", flush=True)
    model = {"model": arguments.model, "max_tokens": arguments.max_tokens}
    arguments.out.write_text(json.dumps([model | r for r in recordings], separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
