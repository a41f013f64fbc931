"""PrefixCache: finds blocks by the tokens that they and all blocks before them hold.

A full block is named by a chain: digest(i) = SHA-256(digest(i-1) || tokens of block i), started from the
request's cache salt. A look-up compares the tokens and the parent as well, so that even a collision could
not give another prompt's keys and values (LESSONS: prefix cache gives wrong output).
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jpaged.memory.allocator import NULL_BLOCK


class _Entry(NamedTuple):
    blocks: list[int]
    """Of each layer group; the null block where nobody has it."""
    parent: bytes
    tokens: bytes


def root_digest(salt: str = "", weights_version: int = 0) -> bytes:
    """The parent of a first block. Requests with different salts, or under different weights, never share blocks."""
    return hashlib.sha256(b"jpaged-prefix" + weights_version.to_bytes(8) + salt.encode()).digest()


def token_bytes(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, np.int32).tobytes()


def chain(parent: bytes, tokens: bytes) -> bytes:
    return hashlib.sha256(parent + tokens).digest()


def _behind_nothing(position: Any) -> np.ndarray:
    """One layer group, without a window."""
    return np.zeros((*np.shape(position), 1), np.int32)


class PrefixCache:
    """A map from chain digests to blocks, one for each layer group; the allocator decides how long each stays."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._by_digest: dict[bytes, _Entry] = {}
        self._by_block: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._by_block)

    def match(
        self, tokens: Sequence[int], root: bytes, behind_window: Callable[[Any], np.ndarray] = _behind_nothing
    ) -> tuple[list[int], list[bytes]]:
        """The longest chain of cached full blocks at the start of `tokens`: (table entries, digests).

        At least one token is left out, because a sequence's next token needs the logits of its last.

        Args:
          behind_window: of a position, or int32 [n]: how many leading blocks of each layer group, [..., G], a token
            there does not attend to. Those need not be cached, and are null blocks in the result.
        """
        size = self.block_size
        chain_of: list[list[int]] = []
        digests: list[bytes] = []
        parent = root
        unseen = behind_window(len(tokens)).tolist()  # wherever the match ends
        for start in range(0, len(tokens) - size, size):
            digest, entry = self._find(parent, token_bytes(tokens[start : start + size]))
            blocks = [NULL_BLOCK] * len(unseen) if entry is None else entry.blocks
            if NULL_BLOCK in blocks and any(
                block == NULL_BLOCK and first <= len(digests) for block, first in zip(blocks, unseen, strict=True)
            ):
                break
            chain_of.append(blocks)
            digests.append(digest)
            parent = digest
        if not digests:
            return [], []
        table, ends = np.array(chain_of), np.arange(1, len(digests) + 1)
        behind = behind_window(ends * size)  # [n, G], if the match ended there
        missing = np.maximum.accumulate(np.where(table == NULL_BLOCK, ends[:, None], 0))  # blocks up to the last one
        longest = int(np.where((missing <= behind).all(axis=1), ends, 0).max())
        table = table[:longest]
        table[ends[:longest, None] <= behind[longest - 1]] = NULL_BLOCK
        return table.ravel().tolist(), digests[:longest]

    def insert(self, parent: bytes, tokens: Sequence[int], blocks: Sequence[int]) -> tuple[bytes, list[int]]:
        """Names a full block, which is one of each layer group.

        Returns: (digest, those of the blocks that are now in the cache).

        If equal content is cached already, in another block, that one stays and this one is not entered; nor is the
        null block, which is where a full block was before the window left it.
        """
        content = token_bytes(tokens)
        digest, entry = self._find(parent, content)
        if entry is None:
            if digest in self._by_digest or not any(blocks):
                return digest, []
            self._by_digest[digest] = _Entry(list(blocks), parent, content)
            entered = [block for block in blocks if block != NULL_BLOCK]
        else:
            entered = []
            for group, block in enumerate(blocks):
                if block != NULL_BLOCK and entry.blocks[group] == NULL_BLOCK:
                    entry.blocks[group] = block
                    entered.append(block)
        for block in entered:
            self._by_block[block] = digest
        return digest, entered

    def content(self) -> dict[int, tuple[int, bytes, bytes]]:
        """Of each block, (layer group, digest of its parent, its tokens' int32 bytes): what `insert` names it by."""
        return {
            block: (group, entry.parent, entry.tokens)
            for entry in self._by_digest.values()
            for group, block in enumerate(entry.blocks)
            if block != NULL_BLOCK
        }

    def evict(self, block: int) -> None:
        digest = self._by_block.pop(block)
        blocks = self._by_digest[digest].blocks
        blocks[blocks.index(block)] = NULL_BLOCK
        if not any(blocks):
            del self._by_digest[digest]

    def clear(self) -> None:
        self._by_digest.clear()
        self._by_block.clear()

    def _find(self, parent: bytes, content: bytes) -> tuple[bytes, _Entry | None]:
        """(digest, its entry if that is of these very tokens)."""
        digest = chain(parent, content)
        entry = self._by_digest.get(digest)
        return digest, entry if entry is not None and (entry.parent, entry.tokens) == (parent, content) else None
