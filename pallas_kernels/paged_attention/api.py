"""Paged attention: one function per operation, whatever platform implements it.

A layer's pool is one array [num_blocks, 2, Hkv, block_size, D]: a block holds `block_size` tokens, its keys at [:, 0]
and its values at [:, 1], so that copying or swapping a block moves one contiguous run. Block 0 is the null block:
padding writes there, and nothing that matters reads it. A quantised pool is a `QuantizedKV`, which has the same shape
and scales beside it.

A pool [num_blocks, 1, Hkv, block_size, D] holds keys that are their tokens' values too: the latents of multi-head
latent attention (arXiv 2405.04434), whose values are the first columns of the keys. Nothing is stored or read twice.

Implementations: "xla" runs everywhere; "triton" on NVIDIA GPUs from capability 8.0 on; "mosaic", for Hopper, and
"jax_triton", which decodes, only where they are asked for. Left alone, "triton" runs where it supports the dtype and
the shape, and else "xla"; `implementation=` or the environment's JPAGED_KERNELS choose another.
"""

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels import dispatch
from pallas_kernels.paged_attention import xla
from pallas_kernels.paged_attention.options import Options
from pallas_kernels.paged_attention.quantized import KV
from pallas_kernels.paged_attention.shared import SharedPrefixes


def pool_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, parts: int = 2) -> tuple[int, ...]:
    """Shape of one layer's pool; parts: 2 for keys and values, 1 for keys that are values too."""
    return (num_blocks, parts, num_kv_heads, block_size, head_dim)


def write_kv[Pool: KV](kv: Pool, k: jax.Array, v: jax.Array | None, slots: jax.Array) -> Pool:
    """Writes the keys and values of T tokens to their slots.

    Args:
      kv: [num_blocks, 2, Hkv, block_size, D]; updated in place where it is donated.
      k, v: [T, Hkv, D]; quantised on the way into a quantised pool. v is None for a pool of keys alone.
      slots: int32 [T]: block * block_size + offset. Slots may repeat in the null block only.

    Returns: the layer's pool.
    """
    return xla.write_kv(kv, k, v, slots)


def paged_decode_attention(
    q: jax.Array,
    kv: KV,
    block_tables: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    sliding_window: int | None = None,
    logit_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    return_lse: bool = False,
    split_tokens: int | None = None,
    shared: SharedPrefixes | None = None,
    implementation: str | None = None,
) -> Any:
    """Attention of one query per row over the row's cached tokens (paper, section 4.1).

    Args:
      q: [R, Hq, D]; Hq is a multiple of the pool's Hkv.
      kv: [num_blocks, 2, Hkv, block_size, D].
      block_tables: int32 [R, W]: logical to physical blocks.
      lengths: int32 [R]: cached tokens to attend to, the query's own included. 0 marks padding and gives zeros.
      scale: factor on the scores, usually D ** -0.5.
      sliding_window: attend to the last so many tokens only.
      logit_soft_cap: scores become cap * tanh(score / cap).
      sinks: [Hq]: a learned score for each head that takes its share of the softmax and has no value.
      return_lse: also return the log of the sum of the exponentials, by which partial results are merged.
      split_tokens: cut rows into splits of so many tokens, whatever the batch is: the result of a row is then bitwise
        the same in any batch. None: cut the rows so that the batch keeps the GPU busy. Without meaning for "xla".
      shared: rows that begin with the same blocks: these are read once for all of them, and what follows is merged by
        the online softmax. Changes the speed and nothing else.
      implementation: "auto", "xla", "triton", "mosaic" or "jax_triton"; None: the environment's JPAGED_KERNELS, else
        "auto".

    Returns: [R, Hq, D], q's dtype, and with return_lse float32 [R, Hq], -inf for padding. Sums are float32. Over
    a pool of keys alone they are sums of whole keys, of which the caller takes the columns that are values.

    Raises:
      ValueError: the implementation asked for is unknown.
      dispatch.Unsupported: a ValueError; it does not support these arguments, or needs a package that is not installed.
      NotImplementedError: when differentiated.
    """
    attend = dispatch.implementation(__package__, "paged_decode_attention", implementation, q, kv)
    options = Options(scale, sliding_window, logit_soft_cap, return_lse, split_tokens)
    return _not_differentiable(attend, options)(q, kv, block_tables, lengths, sinks, shared)


def paged_prefill_attention(
    q: jax.Array,
    kv: KV,
    block_tables: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    sliding_window: int | None = None,
    logit_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Causal attention of tiles of consecutive queries, whose own keys and values are in the pool already.

    Args:
      q: [P, C, Hq, D]: tile p holds the queries at positions starts[p], starts[p] + 1, ...
      block_tables: int32 [P, W].
      starts: int32 [P].
      lengths: int32 [P]: real queries of each tile; the rest of the C gives zeros.
      kv, scale, sliding_window, logit_soft_cap, sinks, return_lse, implementation: as in `paged_decode_attention`.

    Returns: [P, C, Hq, D], q's dtype, and with return_lse float32 [P, C, Hq].

    Raises: as `paged_decode_attention`.
    """
    attend = dispatch.implementation(__package__, "paged_prefill_attention", implementation, q, kv)
    options = Options(scale, sliding_window, logit_soft_cap, return_lse)
    return _not_differentiable(attend, options)(q, kv, block_tables, starts, lengths, sinks)


def _not_differentiable(attend: Callable, options: Options) -> Callable:
    def no_derivative(primals, tangents):
        raise NotImplementedError(
            "paged attention has no derivative: train with the model's forward pass without a pool"
        )

    guarded = jax.custom_jvp(lambda *arguments: attend(*arguments, options))
    guarded.defjvp(no_derivative)
    return guarded
