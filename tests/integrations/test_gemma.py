"""Checkpoints of DeepMind's gemma package, in both directions, and its own model beside ours.

Skipped without it:

    uv run --with gemma --with "protobuf>=7.36" pytest tests/integrations/test_gemma.py
"""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("gemma.gm", reason="DeepMind's gemma is not installed")

from gemma import gm
from gemma.gm.nn import _config

import checkpoints
from checkpoints.hf_config import config_to_hf
from jpaged.models.config import config_from_hf
from tests.integrations.alike import TOKENS, assert_alike, disturbed, our_logits, our_params

WINDOW = 8
SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": WINDOW,
}
GEMMA2 = {"model_type": "gemma2", "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0}
GEMMA3 = {"model_type": "gemma3_text", "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0}
LOCAL, GLOBAL = gm.nn.AttentionType.LOCAL_SLIDING, gm.nn.AttentionType.GLOBAL
CASES = {  # what Hugging Face's configuration says, KV heads, whether gating_einsum is transposed
    "gemma 2": (GEMMA2, 2, False),
    "gemma 2, transposed": (GEMMA2, 2, True),
    "gemma 2, as many KV heads": (GEMMA2, 4, False),
    "gemma 3": (GEMMA3, 1, True),
}


@pytest.fixture(scope="module", params=CASES)
def both(request):
    """The same architecture twice: ours, and DeepMind's with random parameters."""
    family, kv_heads, transposed = CASES[request.param]
    hf = SIZES | {"num_key_value_heads": kv_heads} | family
    second = family is GEMMA2
    layers = hf["num_hidden_layers"]
    theirs = _config.TransformerConfig(
        num_embed=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        hidden_dim=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=kv_heads,
        head_dim=hf["head_dim"],
        final_logit_softcap=hf.get("final_logit_softcapping"),
        attn_logits_soft_cap=hf.get("attn_logit_softcapping"),
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        use_qk_norm=not second,
        attention_types=_config.make_attention_layers_types(
            (LOCAL, GLOBAL) if second else (*[LOCAL] * 5, GLOBAL), num_layers=layers
        ),
        sliding_window_size=WINDOW,
        transpose_gating_einsum=transposed,
        local_base_frequency=10_000,
        global_base_frequency=10_000 if second else 1_000_000,
    )
    model = gm.nn.Transformer(config=theirs, dtype=jnp.float32)
    params = disturbed(model.init(jax.random.key(0), TOKENS[None])["params"])
    return SimpleNamespace(
        config=config_from_hf(hf),
        params=params,
        logits=lambda params: np.asarray(model.apply({"params": params}, TOKENS[None]).logits)[0],
        transposed=transposed,
    )


def test_what_gemma_wrote_is_read(both, tmp_path):
    gm.ckpts.save_params(both.params, tmp_path / "x", wait_until_finished=True)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(both.config, "float32")))
    read = checkpoints.load(tmp_path / "x", skip_tokenizer=True)
    assert_alike(our_logits(read.config, read.params), both.logits(both.params))


def test_what_jpaged_wrote_is_read_by_gemma(both, tmp_path):
    if both.transposed:
        pytest.skip("jpaged writes the other order")
    params = our_params(both.config)
    checkpoints.save(tmp_path / "x", both.config, params, format="gemma")
    assert_alike(our_logits(both.config, params), both.logits(gm.ckpts.load_params(tmp_path / "x")))
