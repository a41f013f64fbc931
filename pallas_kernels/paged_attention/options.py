"""Options: what attention is asked for besides its arrays."""

from typing import NamedTuple


class Options(NamedTuple):
    """Static: a kernel is made for each. What they mean stands in `api.paged_decode_attention`."""

    scale: float
    window: int | None = None
    """`sliding_window`."""
    cap: float | None = None
    """`logit_soft_cap`."""
    return_lse: bool = False
    split_tokens: int | None = None
    """Decoding only."""
