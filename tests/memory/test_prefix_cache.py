"""PrefixCache: a block is found by all tokens up to its end, and by nothing less."""

import numpy as np
import pytest

from jpaged.memory import prefix_cache
from jpaged.memory.prefix_cache import PrefixCache, root_digest

ROOT = root_digest()


def filled(tokens, blocks, *, size=2, root=ROOT):
    """A cache that holds the full blocks of `tokens`."""
    cache, parent = PrefixCache(size), root
    for i, block in enumerate(blocks):
        parent, entered = cache.insert(parent, tokens[i * size : (i + 1) * size], [block])
        assert entered
    return cache


@pytest.mark.parametrize(("length", "hits"), [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (6, 2), (9, 2)])
def test_finds_full_blocks_and_leaves_at_least_one_token_to_compute(length, hits):
    cache = filled([5, 6, 7, 8], [10, 11])
    blocks, digests = cache.match([5, 6, 7, 8, 9, 9, 9, 9, 9][:length], ROOT)
    assert blocks == [10, 11][:hits]
    assert len(digests) == hits


def test_equal_blocks_after_different_beginnings_are_different():
    cache = filled([1, 1, 7, 7], [10, 11])
    assert cache.match([2, 2, 7, 7, 0], ROOT)[0] == []
    assert cache.match([7, 7, 0], ROOT)[0] == [], "the second block is not a first block"
    assert cache.match([1, 1, 7, 7, 0], ROOT)[0] == [10, 11]


def test_a_hole_in_the_chain_hides_what_is_behind_it():
    cache = filled([1, 2, 3, 4, 5, 6], [10, 11, 12])
    cache.evict(11)
    assert cache.match([1, 2, 3, 4, 5, 6, 7], ROOT)[0] == [10]
    digest = cache.match([1, 2, 0], ROOT)[1][-1]
    assert cache.insert(digest, [3, 4], [20])[1]
    assert cache.match([1, 2, 3, 4, 5, 6, 7], ROOT)[0] == [10, 20, 12], "filled again, by another block"


def test_salts_separate():
    cache = filled([1, 2], [10], root=root_digest("tenant A"))
    assert cache.match([1, 2, 3], root_digest("tenant A"))[0] == [10]
    assert cache.match([1, 2, 3], root_digest("tenant B"))[0] == []
    assert cache.match([1, 2, 3], ROOT)[0] == []


def test_the_first_of_two_equal_blocks_stays():
    cache = filled([1, 2], [10])
    digest, entered = cache.insert(ROOT, [1, 2], [11])
    assert not entered
    assert cache.match([1, 2, 3], ROOT) == ([10], [digest])
    assert len(cache) == 1


def test_clear_forgets_everything():
    cache = filled([1, 2, 3, 4], [10, 11])
    cache.clear()
    assert len(cache) == 0
    assert cache.match([1, 2, 3, 4, 5], ROOT) == ([], [])
    assert cache.insert(ROOT, [1, 2], [11])[1]


def test_a_colliding_digest_is_no_hit(monkeypatch):
    """A hash that says the same of everything: tokens and parents are compared as well."""
    monkeypatch.setattr(prefix_cache, "chain", lambda parent, tokens: b"same")
    cache = filled([1, 2], [10])
    assert cache.match([1, 2, 0], ROOT)[0] == [10]
    assert cache.match([3, 4, 0], ROOT)[0] == [], "other tokens"
    assert cache.match([1, 2, 0], root_digest("salt"))[0] == [], "another parent"
    assert cache.match([1, 2, 1, 2, 0], ROOT)[0] == [10], "the second block is not the first"


def test_a_prefix_ends_where_every_layer_group_has_what_it_needs():
    """The first group sees everything, the second one 3 tokens; blocks of 2."""
    cache, parent, tokens = PrefixCache(2), ROOT, [1, 2, 3, 4, 5, 6, 7, 8, 9]
    for i in range(4):
        parent, entered = cache.insert(parent, tokens[2 * i : 2 * i + 2], [10 + i, 20 + i])
        assert entered == [10 + i, 20 + i]

    def behind(position):
        return np.maximum(np.asarray(position)[..., None] + 1 - np.array([1000, 3]), 0) // 2

    assert cache.match(tokens, ROOT, behind)[0] == [10, 0, 11, 0, 12, 0, 13, 23]
    cache.evict(21)
    assert cache.match(tokens, ROOT, behind)[0] == [10, 0, 11, 0, 12, 0, 13, 23], "nobody needs it"
    assert cache.match(tokens[:6], ROOT, behind)[0] == [10, 20], "here the token after it does"
    cache.evict(12)
    assert cache.match(tokens, ROOT, behind)[0] == [10, 20]
    assert cache.insert(cache.match(tokens[:3], ROOT, behind)[1][-1], [3, 4], [0, 31])[1] == [31], "filled again"
    assert cache.match(tokens, ROOT, behind)[0] == [10, 0, 11, 31]
    for block in (10, 20, 11, 31, 22, 13, 23):
        cache.evict(block)
    assert len(cache) == 0
