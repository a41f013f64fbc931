"""PrefixCache: finds blocks by the tokens that they and all blocks before them hold.

A full block is named by a chain: digest(i) = SHA-256(digest(i-1) || tokens of block i), started from the
request's cache salt. A look-up compares the tokens and the parent as well, so that even a collision could
not give another prompt's keys and values (LESSONS: prefix cache gives wrong output).
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


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

    def match(self, tokens: Sequence[int], root: bytes) -> tuple[list[int], list[bytes]]:
        """The longest chain of cached full blocks at the start of `tokens`: (blocks, digests).

        At least one token is left out, because a sequence's next token needs the logits of its last.
        """
        size = self.block_size
        blocks: list[int] = []
        digests: list[bytes] = []
        parent = root
        for start in range(0, len(tokens) - size, size):
            content = token_bytes(tokens[start : start + size])
            digest = chain(parent, content)
            entry = self._by_digest.get(digest)
            if entry is None or entry.parent != parent or entry.tokens != content:
                break
            blocks.append(entry.block)
            digests.append(digest)
            parent = digest
        return blocks, digests

    def insert(self, parent: bytes, tokens: Sequence[int], block: int) -> tuple[bytes, bool]:
        """Names a full block. Returns (digest, whether the block is now in the cache).

        If equal content is cached already, in another block, that one stays and this one is not entered.
        """
        content = token_bytes(tokens)
        digest = chain(parent, content)
        if digest in self._by_digest:
            return digest, False
        self._by_digest[digest] = _Entry(block, parent, content)
        self._by_block[block] = digest
        return digest, True

    def evict(self, block: int) -> None:
        del self._by_digest[self._by_block.pop(block)]

    def clear(self) -> None:
        self._by_digest.clear()
        self._by_block.clear()
