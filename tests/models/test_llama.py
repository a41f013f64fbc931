"""The Llama module in the hands of a researcher, without an engine. Its numbers are `test_families`' matter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import checkpoints
from jpaged.models.config import RopeConfig
from jpaged.models.layout import PagedLayout
from jpaged.models.registry import build
from jpaged.models.rope import inverse_frequencies
from jpaged.runtime.kv_pool import KVPoolSpec
from tests.engine.support import GOLDENS

BLOCK = 4


@pytest.fixture(scope="module", params=["llama", "mistral"])
def family(request):
    folder = GOLDENS / "models" / request.param
    checkpoint = checkpoints.load(folder, skip_tokenizer=True)
    return build(checkpoint.config, jnp.float32), checkpoint.params, np.load(folder / "reference.npz")


def logits_of(model, params, hidden):
    return model.apply({"params": params}, hidden, method="logits")


def layout_for(table, start, length, chunk):
    """A tile of `length` tokens of one sequence and no decode lane; or, with chunk 1, one decode row."""
    positions = start + jnp.arange(chunk)
    slots = table[positions // BLOCK] * BLOCK + positions % BLOCK
    none = jnp.zeros((0,), jnp.int32)
    empty = jnp.zeros((0, len(table)), jnp.int32)
    if chunk == 1:
        return PagedLayout(slots, table[None], jnp.array([start + 1]), empty, none, none)
    return PagedLayout(
        jnp.where(jnp.arange(chunk) < length, slots, 0),
        empty,
        none,
        table[None],
        jnp.array([start]),
        jnp.array([length]),
    )


@pytest.mark.parametrize("prompt", ["p0", "p1"])
def test_paged_chunks_then_decode_in_a_scan(family, prompt):
    """Prefill in chunks of 5, then greedy decoding inside one lax.scan: no engine, no host in the loop (contract 2)."""
    model, params, reference = family
    tokens = reference[f"{prompt}_input_ids"]
    expected = reference[f"{prompt}_greedy_ids"]
    blocks = -(-(len(tokens) + len(expected)) // BLOCK)
    table = jnp.asarray(1 + np.random.default_rng(0).permutation(blocks + 3)[:blocks], jnp.int32)
    pool = KVPoolSpec.of(model.config, jnp.float32, blocks + 4, BLOCK).allocate()
    apply = jax.jit(lambda *args: model.apply({"params": params}, *args))
    logits = []
    for start in range(0, len(tokens), 5):
        length = min(5, len(tokens) - start)
        chunk = np.zeros(5, np.int32)
        chunk[:length] = tokens[start : start + length]
        hidden, pool = apply(jnp.asarray(chunk), start + jnp.arange(5), pool, layout_for(table, start, length, 5))
        logits.append(logits_of(model, params, hidden[:length]))
    logits = jnp.concatenate(logits)
    np.testing.assert_allclose(logits, reference[f"{prompt}_logits"], atol=1e-4)

    def decode(carry, position):
        token, pool = carry
        hidden, pool = model.apply(
            {"params": params}, token[None], position[None], pool, layout_for(table, position, 1, 1)
        )
        token = logits_of(model, params, hidden)[0].argmax().astype(jnp.int32)
        return (token, pool), token

    first = logits[-1].argmax().astype(jnp.int32)
    _, rest = jax.lax.scan(decode, (first, pool), len(tokens) + jnp.arange(len(expected) - 1))
    assert [int(first), *rest.tolist()] == expected.tolist()


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "deepseek_v3"])
def test_gradients_flow_through_the_training_forward(name):
    """Also to experts, through the grouped matmul, and to routers and latents."""
    folder = GOLDENS / "models" / name
    checkpoint = checkpoints.load(folder, skip_tokenizer=True)
    model = build(checkpoint.config, jnp.float32)
    tokens = jnp.asarray(np.load(folder / "reference.npz")["p1_input_ids"])[None]

    def loss(params):
        logits = model.apply({"params": params}, tokens, method="forward_logits")
        return -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1).mean()

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def step(params):
        value, gradients = jax.value_and_grad(loss)(params)
        stepped = jax.tree.map(lambda p, g: p - 0.01 * g, params, gradients)
        return value, gradients, loss(stepped)

    value, gradients, after = step(checkpoint.params)
    for path, gradient in jax.tree.leaves_with_path(gradients):
        assert np.isfinite(gradient).all(), path
        # The bias that chooses DeepSeek's experts has no gradient: it is trained by balancing their load.
        assert np.any(gradient) or path[-1].key == "e_score_correction_bias", path
    assert after < value


def test_apply_under_vmap(family):
    """Several pools side by side."""
    model, params, reference = family
    tokens = jnp.asarray(reference["p0_input_ids"])
    spec = KVPoolSpec.of(model.config, jnp.float32, 4, BLOCK)
    table = jnp.array([1, 2, 0], jnp.int32)
    pools = jax.tree.map(lambda x: jnp.stack([x, x]), spec.allocate())
    layout = layout_for(table, 0, len(tokens), len(tokens))
    both = jnp.stack([tokens, tokens[::-1]])
    hidden, _ = jax.vmap(lambda t, pool: model.apply({"params": params}, t, jnp.arange(len(tokens)), pool, layout))(
        both, pools
    )
    dense, _ = model.apply({"params": params}, both)
    np.testing.assert_allclose(hidden, dense, atol=1e-5)


def test_bfloat16_is_close(family):
    model, params, reference = family
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    tokens = jnp.asarray(reference["p1_input_ids"])[None]
    logits = build(model.config, jnp.bfloat16).apply({"params": half}, tokens, method="forward_logits")
    assert logits.dtype == jnp.float32
    reference_logits = reference["p1_logits"]
    assert np.abs(logits[0] - reference_logits).mean() < 0.03 * reference_logits.std()


def test_rope_variants_match_transformers():
    """Frequencies of every scaling variant against Hugging Face's formulas, which need no torch to be read."""
    base = 1 / 10000 ** (np.arange(0, 16, 2) / 16)
    linear, _ = inverse_frequencies(RopeConfig(rope_type="linear", factor=4.0), 16)
    np.testing.assert_allclose(linear, base / 4, rtol=1e-6)
    llama3 = RopeConfig(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    scaled, attention = inverse_frequencies(llama3, 16)
    wavelength = 2 * np.pi / base
    smooth = (8192 / wavelength - 1) / 3
    expected = np.where(
        wavelength > 8192, base / 8, np.where(wavelength < 2048, base, (1 - smooth) * base / 8 + smooth * base)
    )
    np.testing.assert_allclose(scaled, expected, rtol=1e-6)
    assert attention == 1.0
    yarn = RopeConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=2048)
    scaled, attention = inverse_frequencies(yarn, 16)
    assert attention == pytest.approx(0.1 * np.log(4) + 1)
    np.testing.assert_allclose(scaled[0], base[0], rtol=1e-6)  # fast dimensions stay
    np.testing.assert_allclose(scaled[-1], base[-1] / 4, rtol=1e-6)  # slow ones are interpolated
    longrope = RopeConfig(
        rope_type="longrope",
        factor=4.0,
        original_max_position_embeddings=2048,
        short_factor=(1.0,) * 8,
        long_factor=(2.0,) * 8,
    )
    scaled, attention = inverse_frequencies(longrope, 16)
    np.testing.assert_allclose(scaled, base / 2, rtol=1e-6)
    assert attention == pytest.approx(np.sqrt(1 + np.log(4) / np.log(2048)))
