"""Decode attention of other libraries on our shapes, where they are installed: one library in a process.

jpaged       ours, as it is chosen for the GPU
jax          jax.experimental.pallas.ops.gpu.paged_attention, which JAX has deprecated
torch        scaled_dot_product_attention over caches that are not paged: what there is to reach for
flashinfer   BatchDecodeWithPagedKVCacheWrapper over the very layout of our pool

All rows are equally long; each gets float64's answer on a small shape first. GB/s are those of the keys and values.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.inputs import BLOCK_SIZE, scattered_tables
from benchmarks.gpu.part import Recorder, Skipped
from benchmarks.gpu.timing import seconds
from pallas_kernels.paged_attention import paged_decode_attention, pool_shape
from pallas_kernels.paged_attention.reference import paged_attention

HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128
CASES = ((64, 4096), (1, 16384), (8, 1024), (8, 16384), (64, 1024), (256, 1024))  # batch, context
SMALL = (2, 256)
TOLERANCE = 1e-2  # bfloat16


class Arrays(NamedTuple):
    """A case, as NumPy arrays; bfloat16 ones as float32."""

    q: np.ndarray  # [R, Hq, D]
    kv: np.ndarray  # [num_blocks, 2, Hkv, block_size, D]
    tables: np.ndarray  # int32 [R, W]
    context: int

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5


class Attention(NamedTuple):
    """One library's attention over one case."""

    call: Callable[[Any], Any]
    """Queries to results like them."""
    q: Any
    wait: Callable[[Any], Any]
    numpy: Callable[[Any], np.ndarray]


def run(recorder: Recorder, library: str) -> None:
    """The cases in one library."""
    prepare = LIBRARIES[library]
    heads = (4, 2, 64) if recorder.dry_run else (HEADS, KV_HEADS, HEAD_SIZE)
    if library != "jpaged" and library != "jax" and importlib.util.find_spec(library) is None:
        raise Skipped(f"{library} is not installed")
    recorder.case({"library": library, "case": "correct"}, lambda: _check(prepare, _arrays(*SMALL, *heads)))
    for batch, context in (SMALL,) if recorder.dry_run else CASES:
        about = {"library": library, "batch": batch, "context": context}
        recorder.case(about, functools.partial(_time, prepare, batch, context, heads))


def _arrays(batch: int, context: int, heads: int, kv_heads: int, size: int) -> Arrays:
    """Noise: one block's, in every block, where there are many."""
    rng = np.random.default_rng(0)
    count = batch * -(-context // BLOCK_SIZE) + 1
    shape = pool_shape(count, BLOCK_SIZE, kv_heads, size)
    kv = rng.standard_normal((min(count, 64), *shape[1:]), np.float32)
    kv = np.resize(kv.astype(jnp.bfloat16).astype(np.float32), shape)
    q = rng.standard_normal((batch, heads, size), np.float32).astype(jnp.bfloat16).astype(np.float32)
    return Arrays(q, kv, scattered_tables(batch, context, count, 1)[0], context)


def _check(prepare: Callable[[Arrays], Attention], arrays: Arrays) -> dict[str, Any]:
    attention = prepare(arrays)
    got = attention.numpy(attention.wait(attention.call(attention.q)))
    rows = len(arrays.q)
    starts, ones = np.full(rows, arrays.context - 1), np.ones(rows, int)
    wanted, _ = paged_attention(arrays.q[:, None], arrays.kv, arrays.tables, starts, ones, scale=arrays.scale)
    error = np.abs(got - wanted[:, 0])
    return {"error": float(error.max()), "ok": bool((error <= TOLERANCE * (1 + np.abs(wanted[:, 0]))).all())}


def _time(prepare: Callable[[Arrays], Attention], batch: int, context: int, heads: tuple[int, int, int]) -> dict:
    attention = prepare(_arrays(batch, context, *heads))
    elapsed, _ = seconds(attention.call, attention.q, attention.wait)
    return {"us": 1e6 * elapsed, "GB/s": 4 * batch * context * heads[1] * heads[2] / elapsed / 1e9}


def _in_jax(attend: Callable, arrays: Arrays, *operands: jax.Array) -> Attention:
    call = jax.jit(attend)
    return Attention(
        lambda q: call(q, *operands),
        jnp.asarray(arrays.q, jnp.bfloat16),
        jax.block_until_ready,
        lambda out: np.asarray(out, np.float32),
    )


def _jpaged(arrays: Arrays) -> Attention:
    attend = functools.partial(paged_decode_attention, scale=arrays.scale)
    lengths = jnp.full(len(arrays.q), arrays.context, jnp.int32)
    return _in_jax(attend, arrays, jnp.asarray(arrays.kv, jnp.bfloat16), jnp.asarray(arrays.tables), lengths)


def _jax(arrays: Arrays) -> Attention:
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention as theirs

    interpret = jax.default_backend() != "gpu"
    k, v = (jnp.asarray(arrays.kv[:, side].swapaxes(0, 1), jnp.bfloat16) for side in (0, 1))
    lengths = jnp.full(len(arrays.q), arrays.context, jnp.int32)

    def attend(q, k, v, tables, lengths):  # it does not scale
        return theirs((q * arrays.scale).astype(q.dtype), k, v, tables, lengths, interpret=interpret)

    return _in_jax(attend, arrays, k, v, jnp.asarray(arrays.tables), lengths)


def _in_torch(attend: Callable, arrays: Arrays) -> Attention:
    import torch

    q = torch.tensor(arrays.q, dtype=torch.bfloat16, device=_torch_device())

    def wait(x):
        if x.is_cuda:
            torch.cuda.synchronize()
        return x

    return Attention(attend, q, wait, lambda out: out.float().cpu().numpy())


def _torch_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _torch(arrays: Arrays) -> Attention:
    import torch

    contexts = arrays.kv[arrays.tables].transpose(2, 0, 3, 1, 4, 5)  # [2, R, Hkv, W, block, D]
    contexts = contexts.reshape(*contexts.shape[:3], -1, contexts.shape[-1])[:, :, :, : arrays.context]
    k, v = torch.tensor(contexts, dtype=torch.bfloat16, device=_torch_device())

    def attend(q):
        attended = torch.nn.functional.scaled_dot_product_attention(
            q[:, :, None], k, v, scale=arrays.scale, enable_gqa=True
        )
        return attended[:, :, 0]

    return _in_torch(attend, arrays)


def _flashinfer(arrays: Arrays) -> Attention:
    import flashinfer
    import torch

    if _torch_device() == "cpu":
        raise Skipped("needs an NVIDIA GPU")
    (rows, heads, size), (_, _, kv_heads, block_size, _) = arrays.q.shape, arrays.kv.shape
    kv = torch.tensor(arrays.kv, dtype=torch.bfloat16, device="cuda")
    width = arrays.tables.shape[1]
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(128 << 20, dtype=torch.uint8, device="cuda"), kv_layout="HND", use_tensor_cores=True
    )
    wrapper.plan(
        torch.arange(0, rows * width + 1, width, dtype=torch.int32, device="cuda"),
        torch.tensor(arrays.tables.reshape(-1), device="cuda"),
        torch.full((rows,), (arrays.context - 1) % block_size + 1, dtype=torch.int32, device="cuda"),
        heads,
        kv_heads,
        size,
        block_size,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
        sm_scale=arrays.scale,
    )
    return _in_torch(lambda q: wrapper.run(q, kv), arrays)


LIBRARIES = {"jpaged": _jpaged, "jax": _jax, "torch": _torch, "flashinfer": _flashinfer}
