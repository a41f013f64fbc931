"""PrefixCache: finds blocks by the tokens that they and all blocks before them hold.

A full block is named by a chain: digest(i) = SHA-256(digest(i-1) || tokens of block i), started from the
request's cache salt. A look-up compares the tokens and the parent as well, so that even a collision could
not give another prompt's keys and values (LESSONS: prefix cache gives wrong output).
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jpaged.memory.allocator import NULL_BLOCK


class _Entry(NamedTuple):
    block: int
    parent: bytes
    tokens: bytes


def root_digest(salt: str = "", weights_version: int = 0) -> bytes:
    """The parent of a first block. Requests with different salts, or under different weights, never share blocks."""
    return hashlib.sha256(b"jpaged-prefix" + weights_version.to_bytes(8) + salt.encode()).digest()


def token_bytes(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, np.int32).tobytes()


def chain(parent: bytes, tokens: bytes) -> bytes:
    return hashlib.sha256(parent + tokens).digest()


class PrefixCache:
    """A map from chain digests to blocks; the allocator decides how long a block stays."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._by_digest: dict[bytes, _Entry] = {}
        self._by_block: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._by_digest)

    def match(
        self, tokens: Sequence[int], root: bytes, behind_window: Callable[[int], int] = lambda position: 0
    ) -> tuple[list[int], list[bytes]]:
        """The longest chain of cached full blocks at the start of `tokens`: (blocks, digests).

        At least one token is left out, because a sequence's next token needs the logits of its last.

        Args:
          behind_window: leading blocks that a token at a position does not attend to. Those need not be cached, and
            are null blocks in the result.
        """
        size = self.block_size
        blocks: list[int] = []
        digests: list[bytes] = []
        parent = root
        missing = longest = 0  # blocks up to the last that is not cached; blocks of the longest match
        for start in range(0, len(tokens) - size, size):
            content = token_bytes(tokens[start : start + size])
            digest = chain(parent, content)
            entry = self._by_digest.get(digest)
            found = entry is not None and entry.parent == parent and entry.tokens == content
            if not found and behind_window(len(tokens)) <= len(blocks):
                break  # it is needed, wherever the match ends
            blocks.append(entry.block if found else NULL_BLOCK)  # type: ignore[union-attr]
            digests.append(digest)
            parent = digest
            if not found:
                missing = len(blocks)
            elif missing <= behind_window(len(blocks) * size):
                longest = len(blocks)
        behind = behind_window(longest * size)
        return [NULL_BLOCK] * behind + blocks[behind:longest], digests[:longest]

    def insert(self, parent: bytes, tokens: Sequence[int], block: int) -> tuple[bytes, bool]:
        """Names a full block. Returns (digest, whether the block is now in the cache).

        If equal content is cached already, in another block, that one stays and this one is not entered; nor is the
        null block, which is where a full block was before the window left it.
        """
        content = token_bytes(tokens)
        digest = chain(parent, content)
        if digest in self._by_digest or block == NULL_BLOCK:
            return digest, False
        self._by_digest[digest] = _Entry(block, parent, content)
        self._by_block[block] = digest
        return digest, True

    def content(self) -> dict[int, tuple[bytes, bytes]]:
        """Of each block, (digest of its parent, its tokens' int32 bytes): what `insert` names it by."""
        return {entry.block: (entry.parent, entry.tokens) for entry in self._by_digest.values()}

    def evict(self, block: int) -> None:
        del self._by_digest[self._by_block.pop(block)]

    def clear(self) -> None:
        self._by_digest.clear()
        self._by_block.clear()
