"""SharedPrefixes: which rows of a batch begin with the same blocks."""

from typing import NamedTuple

import jax


class SharedPrefixes(NamedTuple):
    """Rows that may be read together: samples of one prompt, beams, requests with the same system prompt.

    A row is in one piece at most. What a piece shares is in the leading blocks of its first row's table.
    """

    rows: jax.Array  # int32 [G, S]: rows of the lane; -1 pads
    lengths: (
        jax.Array
    )  # int32 [G]: tokens that a piece shares, none of them after any member's query; 0 pads, at the end
