"""How many prompt blocks does the prefix cache find again? A trace against an ideal LRU of the same size.

    python -m benchmarks.prefix_cache_trace TRACE.csv[.gz] [--blocks 1000 4000 16000] [--json OUT]

TRACE has the columns prompt_tokens and hash_ids: a number for each block of 512 tokens of the prompt, equal numbers for
equal blocks behind equal beginnings (Mooncake's traces, arXiv 2407.00079). The requests run one after the other through
`jpaged.memory.PrefixCache` and `BlockAllocator`; a trace block stands for one block of the pool. Hits are counted as a
cache of keys and values can use them: from the beginning of the prompt to the first block that is missing. A prompt's
last, partly filled block is never kept.

`ideal` is a list of all blocks by their last use; a request's blocks count as used from tail to head, so that its start
is evicted last. `plain` counts them as used from head to tail. Both know nothing of blocks, tables or references.
"""

import argparse
import csv
import gzip
import json
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

from jpaged.memory import BlockAllocator, PrefixCache
from jpaged.memory.prefix_cache import root_digest

TOKENS_PER_HASH = 512


def read_prompts(path: Path) -> list[list[int]]:
    """Of each request: the ids of its prompt's blocks, the last one of which is its remainder."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", newline="") as file:
        rows = [(int(row["prompt_tokens"]), [int(h) for h in row["hash_ids"].split()]) for row in csv.DictReader(file)]
    # A prompt that fills its last block has a remainder too: its last token must be computed.
    return [[*ids[: (tokens - 1) // TOKENS_PER_HASH], -1] for tokens, ids in rows]


def through_cache(prompts: Iterable[list[int]], num_blocks: int) -> list[int]:
    """Blocks found, of each prompt; a block id stands for a block's only token."""
    cache = PrefixCache(block_size=1)
    allocator = BlockAllocator(num_blocks + 1, cache.evict)
    found = []
    for prompt in prompts:
        blocks, digests = cache.match(prompt, root_digest())
        found.append(len(blocks))
        allocator.acquire(blocks)
        full = prompt[: min(len(prompt) - 1, num_blocks)]
        for token in full[len(blocks) :]:
            [block] = allocator.allocate(1)
            digest, entered = cache.insert(digests[-1] if digests else root_digest(), [token], [block])
            if entered:
                allocator.keep(block)
            blocks.append(block)
            digests.append(digest)
        allocator.release(blocks[::-1])
    return found


def through_lru(prompts: Iterable[list[int]], num_blocks: float, *, tail_first: bool = True) -> list[int]:
    """The same, by an ideal LRU of so many blocks."""
    used: OrderedDict[int, None] = OrderedDict()
    found = []
    for prompt in prompts:
        full = prompt[:-1]
        found.append(next((i for i, block in enumerate(full) if block not in used), len(full)))
        for block in reversed(full) if tail_first else full:
            used[block] = None
            used.move_to_end(block)
        while len(used) > num_blocks:
            used.popitem(last=False)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="CSV or CSV.gz: prompt_tokens,hash_ids")
    parser.add_argument("--blocks", type=int, nargs="+", default=[500, 1000, 2000, 4000, 8000, 16000, 32000])
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    prompts = read_prompts(arguments.trace)
    total = sum(len(prompt) - 1 for prompt in prompts)

    everything = sum(through_lru(prompts, float("inf"))) / total
    print(f"{len(prompts)} prompts of {total} full blocks; a cache that never forgets finds {everything:.2%} of them")
    print(f"{'blocks':>8}  {'jpaged':>8}  {'ideal':>8}  {'plain':>8}  {'jpaged / ideal':>14}")
    results = []
    for blocks in arguments.blocks:
        ours = sum(through_cache(prompts, blocks)) / total
        ideal = sum(through_lru(prompts, blocks)) / total
        plain = sum(through_lru(prompts, blocks, tail_first=False)) / total
        results.append({"blocks": blocks, "jpaged": ours, "ideal": ideal, "plain": plain})
        print(f"{blocks:>8}  {ours:>8.3%}  {ideal:>8.3%}  {plain:>8.3%}  {ours / ideal if ideal else 1:>14.4f}")
    if arguments.json:
        report = {"benchmark": "prefix_cache_trace", "everything": everything, "results": results}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
