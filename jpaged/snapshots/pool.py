"""The prefix cache with its keys and values as plain arrays, and back: what the next server need not compute again."""

from typing import Any

import numpy as np

from jpaged.memory import BlockManager
from jpaged.runtime.runner import Runner

Tree = dict[str, Any]


def read_cache(blocks: BlockManager, runner: Runner) -> Tree:
    """All blocks that can be found by their content; {} if there are none.

    Returns: names (`PrefixCache.content`) as int32 [n], uint8 [n, 32] and int32 [n, block_size], and contents by array
    of the pool [n, ...].
    """
    content = blocks.cached_content()
    if not content:
        return {}
    layers = runner.swapper.read(runner.pool, np.array([block for block, *_ in content], np.int32))
    return {
        "weights_version": np.array(blocks.weights_version),
        "groups": np.array([group for _, group, _, _ in content], np.int32),
        "parents": np.frombuffer(b"".join(parent for *_, parent, _ in content), np.uint8).reshape(len(content), -1),
        "tokens": np.array([np.frombuffer(tokens, np.int32) for *_, tokens in content]),
        "layers": {str(i): layer for i, layer in enumerate(layers)},
    }


def adopt_cache(tree: Tree, blocks: BlockManager, runner: Runner) -> int:
    """Lets an engine that has not begun find those blocks, as many as it has room for; the latest used first.

    Returns: how many there are. 0 also if its pool is of another kind: it is a cache, and can do without.
    """
    layers = [tree["layers"][str(i)] for i in range(len(tree["layers"]))] if tree else []
    if not layers or blocks.cache is None or int(tree["weights_version"]) != blocks.weights_version:
        return 0
    if tree["tokens"].shape[1] != blocks.block_size or not runner.swapper.fits(runner.pool, layers):
        return 0
    count = min(len(tree["tokens"]), blocks.num_free)
    names = zip(*(tree[name][-count:] for name in ("groups", "parents", "tokens")), strict=True)
    adopted = blocks.adopt([(int(group), parent.tobytes(), tokens.tolist()) for group, parent, tokens in names])
    runner.pool = runner.swapper.write(runner.pool, [layer[-count:] for layer in layers], adopted)
    return count
