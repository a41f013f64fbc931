"""A function in pieces gives what the function gives, compiles equal calls once, and works in place."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged.runtime.pieces import CALLS_A_PIECE, Pieces


@jax.jit
def layer(w, x, kv):
    return x * 3 + w, kv + x


@jax.jit
def swapped(w, x, kv):
    return kv, x


@jax.jit
def shifted(w, x, kv):
    return x + 1, kv


FUNCTIONS = (layer, swapped, shifted)


def model(ws, x, kvs, functions):
    x, new = x + 2, []
    for w, kv, function in zip(ws, kvs, functions, strict=True):
        x, kv = function(w, x, kv)
        new.append(kv)
    return {"x": x - ws[0], "kvs": new, "constant": 7}


def pieces_of(function, donated, *arguments):
    return Pieces(jax.jit(function, donate_argnums=donated).trace(*arguments))


def numbers(n: int, seed: int = 0):
    return [jnp.asarray(row) for row in np.random.default_rng(seed).integers(-9, 9, (n, 4), np.int32)]


def test_equal_calls_are_compiled_once():
    n = 5 * CALLS_A_PIECE
    arguments = numbers(n), jnp.arange(4), numbers(n, 1)
    pieces = pieces_of(lambda *a: model(*a, [layer] * n), (2,), *arguments)
    assert len(pieces.programs) == 3
    assert len(pieces._pieces) == 2 + 5


def test_donated_memory_is_used_again_and_nothing_else():
    n = 3 * CALLS_A_PIECE
    ws, x, kvs = numbers(n), jnp.arange(4), [jnp.zeros((2, 4), int) for _ in range(n)]
    pieces = pieces_of(lambda *a: model(*a, [layer] * n), (2,), ws, x, kvs)
    pointers, before = [kv.unsafe_buffer_pointer() for kv in kvs], jax.tree.map(np.array, (ws, x))
    result = pieces(ws, x, kvs)
    assert [kv.unsafe_buffer_pointer() for kv in result["kvs"]] == pointers
    assert all(kv.is_deleted() for kv in kvs)
    jax.tree.map(np.testing.assert_array_equal, (ws, x), before)


def test_arrays_that_several_calls_change_stay_where_they_are():
    """Layers of several groups share the pool's arrays: a piece gives them out in another order than it took them in."""
    places = [0, 1, 2, 3, 0, 0, 1, 2, 3, 0, 1, 1, 2, 3, 0, 1, 2, 2]
    ws, x, kvs = numbers(len(places)), jnp.arange(4), [jnp.zeros((2, 4), int) for _ in range(4)]

    def function(ws, x, kvs):
        kvs = list(kvs)
        for w, place in zip(ws, places, strict=True):
            x, kvs[place] = layer(w, x, kvs[place])
        return x, kvs

    wanted = function(ws, x, kvs)
    pieces = pieces_of(function, (2,), ws, x, kvs)
    pointers = [kv.unsafe_buffer_pointer() for kv in kvs]
    result = pieces(ws, x, kvs)
    assert [kv.unsafe_buffer_pointer() for kv in result[1]] == pointers
    jax.tree.map(np.testing.assert_array_equal, result, wanted)


@given(
    st.lists(st.sampled_from(FUNCTIONS), min_size=1, max_size=20).map(lambda fs: sorted(fs, key=FUNCTIONS.index)),
    st.permutations(range(3)),
    st.sets(st.sampled_from([0, 1, 2])),
    st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_gives_what_the_function_gives(functions, order, donated, twice):
    """Any chain of calls; what is given out as it came, read again later, or returned twice."""
    functions = sorted(functions, key=lambda f: order[FUNCTIONS.index(f)])

    def function(ws, x, kvs):
        result = model(ws, x, kvs, functions)
        return (result, result["kvs"], kvs[0] + ws[-1], x) if twice else result

    def arguments():
        return numbers(len(functions)), jnp.arange(4), numbers(len(functions), 1)

    wanted = function(*arguments())
    jax.tree.map(np.testing.assert_array_equal, pieces_of(function, tuple(donated), *arguments())(*arguments()), wanted)
