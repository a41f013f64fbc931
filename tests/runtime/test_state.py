"""Edits of the batch state: forks, then tokens; and padding that touches nobody."""

import jax
import numpy as np
import pytest

from jpaged.runtime import state as batch
from jpaged.runtime.runner import EDITS
from jpaged.scheduling.plan import Edits

ROWS, LENGTH, BLOCK = 6, 20, 4


@pytest.fixture
def state():
    """A state in which every row differs from every other."""
    empty = batch.empty(ROWS, LENGTH, LENGTH // BLOCK, 50)
    tokens = np.arange((ROWS + 1) * LENGTH, dtype=np.int32).reshape(ROWS + 1, LENGTH)
    tables = 1000 + np.arange((ROWS + 1) * 5, dtype=np.int32).reshape(ROWS + 1, 5)
    parameters = np.arange(empty.parameters.size, dtype=np.int32).reshape(empty.parameters.shape)
    return empty._replace(tokens=tokens, tables=tables, parameters=parameters)


def edited(state, edits, size=EDITS):
    return jax.jit(batch.edit)(state, batch.pack_edits(edits, size, null_row=ROWS))


def test_rows_are_forked_before_tokens_are_written(state):
    """Two children of row 1: the token that each gets is its own, and row 1's own comes after the forks."""
    edits = Edits(forks=[(1, 3), (1, 5)], tokens=[(1, 7, 100), (3, 7, 101), (5, 7, 102), (0, 2, 103)])
    after = edited(state, edits)
    tokens, tables = state.tokens.copy(), state.tables.copy()
    tokens[[3, 5]], tables[[3, 5]] = tokens[1], tables[1]
    tokens[[1, 3, 5], 7], tokens[0, 2] = [100, 101, 102], 103
    np.testing.assert_array_equal(after.tokens[:ROWS], tokens[:ROWS])
    np.testing.assert_array_equal(after.tables, tables)


def test_a_fork_keeps_its_own_parameters_and_rules(state):
    after = edited(state, Edits(forks=[(1, 3)]))
    np.testing.assert_array_equal(after.parameters, state.parameters)
    for old, new in zip(state.rules, after.rules, strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("edits", [Edits(), Edits(forks=[(2, 4)]), Edits(tokens=[(2, 3, 9)] * 1)])
@pytest.mark.parametrize("size", [1, EDITS, 3 * EDITS])
def test_padding_touches_the_null_row_alone(state, edits, size):
    after, exact = edited(state, edits, size), edited(state, edits, max(len(edits.forks), len(edits.tokens), 1))
    np.testing.assert_array_equal(after.tokens[:ROWS], exact.tokens[:ROWS])
    np.testing.assert_array_equal(after.tables, exact.tables)
    changed = {row for row, _ in edits.tokens and [(r, p) for r, p, _ in edits.tokens]} | {
        row for _, row in edits.forks
    }
    kept = [row for row in range(ROWS) if row not in changed]
    np.testing.assert_array_equal(after.tokens[np.array(kept)], state.tokens[kept])
    np.testing.assert_array_equal(after.tables[ROWS], state.tables[ROWS])
