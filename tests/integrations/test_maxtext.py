"""Checkpoints of MaxText itself, in both directions: what either wrote, the other one computes alike.

Skipped without MaxText, whose own dependencies are extras for accelerators. So, of what its models import:

    uv run --with maxtext --with omegaconf --with aqtp --with qwix --with drjax --with pathwaysutils \
        --with tensorboardx --with google-tunix --with tokamax --with tiktoken pytest tests/integrations/test_maxtext.py
"""

import functools
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("maxtext", reason="MaxText is not installed")

from flax import linen as nn
from jax.sharding import Mesh
from maxtext.common import checkpointing
from maxtext.configs import pyconfig
from maxtext.models import models
from maxtext.utils import maxtext_utils

import checkpoints
from checkpoints.hf_config import config_to_hf
from jpaged.models.config import config_from_hf
from tests.integrations.alike import TOKENS, assert_alike, disturbed, our_logits, our_params

SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
GEMMA = {"tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 8}
GEMMA |= {"query_pre_attn_scalar": 16}
THEIR_GEMMA = {"mlp_activations": ["gelu", "linear"], "sliding_window_size": 8}
THEIR_GEMMA |= {"use_post_attn_norm": True, "use_post_ffw_norm": True}
GEMMA2_CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0}
FAMILIES = {  # Hugging Face's model_type, what it says besides SIZES, what MaxText's configuration says
    "llama 2": ("llama", {}, {"decoder_block": "llama2"}),
    "llama 3.1": ("llama", {"rope_scaling": LLAMA3}, {"decoder_block": "llama2", "rope_type": "llama3.1"}),
    "mistral": ("mistral", {"sliding_window": None}, {"decoder_block": "mistral"}),
    "mixtral": (
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        {"decoder_block": "mixtral", "num_experts": 4, "num_experts_per_tok": 2, "base_moe_mlp_dim": 96},
    ),
    "qwen 2": ("qwen2", {}, {"decoder_block": "qwen2", "attention_bias": True}),
    "qwen 3": (
        "qwen3",
        {"tie_word_embeddings": True},
        {"decoder_block": "qwen3", "use_qk_norm": True, "normalize_embedding_logits": False},
    ),
    "qwen 3 moe": (
        "qwen3_moe",
        QWEN_MOE,
        {"decoder_block": "qwen3_moe", "use_qk_norm": True, "num_experts": 4, "num_experts_per_tok": 2}
        | {"base_moe_mlp_dim": 48, "norm_topk_prob": True},
    ),
    "gemma 2": (
        "gemma2",
        GEMMA | GEMMA2_CAPS,
        THEIR_GEMMA | {"decoder_block": "gemma2", "attn_logits_soft_cap": 5.0, "final_logits_soft_cap": 8.0},
    ),
    "gemma 3": (
        "gemma3_text",
        GEMMA
        | {"num_hidden_layers": 8, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0}
        | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        THEIR_GEMMA
        | {
            "model_name": "gemma3-4b",
            "override_model_config": True,
            "decoder_block": "gemma3",
            "rope_max_timescale": 1_000_000,
            "local_rope_max_timescale": 10_000,
        },
    ),
}


def their_config(hf: dict, theirs: dict, scanned: bool):
    layers = hf["num_hidden_layers"] // (2 if hf["model_type"] == "gemma2" else 1)  # whose layers are pairs
    base = Path(importlib.util.find_spec("maxtext.configs").origin).parent / "base.yml"
    arguments = {
        "run_name": "test",
        "enable_checkpointing": False,
        "base_emb_dim": hf["hidden_size"],
        "base_num_query_heads": hf["num_attention_heads"],
        "base_num_kv_heads": hf["num_key_value_heads"],
        "base_mlp_dim": hf["intermediate_size"],
        "base_num_decoder_layers": layers,
        "head_dim": hf["head_dim"],
        "mlp_activations": ["silu", "linear"],
        "vocab_size": hf["vocab_size"],
        "logits_via_embedding": hf["tie_word_embeddings"],
        "normalization_layer_epsilon": hf["rms_norm_eps"],
        "rope_max_timescale": int(hf["rope_theta"]),
        "scan_layers": scanned,
        "dtype": "float32",
        "weight_dtype": "float32",
        "matmul_precision": "highest",
        "attention": "dot_product",
        "sparse_matmul": False,
        "megablox": False,
        "capacity_factor": -1.0,
        "max_target_length": len(TOKENS),
        "max_prefill_predict_length": 8,
        "per_device_batch_size": 1,
        "enable_dropout": False,
        "hardware": "cpu",
        "skip_jax_distributed_system": True,
    }
    return pyconfig.initialize(["test", str(base)], **arguments | theirs)


@pytest.fixture(scope="module", params=[(name, scanned) for name in FAMILIES for scanned in (False, True)], ids=str)
def both(request):
    """The same architecture twice: ours, and MaxText's with random parameters."""
    name, scanned = request.param
    model_type, ours, theirs = FAMILIES[name]
    hf = SIZES | {"model_type": model_type, "num_hidden_layers": 4} | ours
    config = their_config(hf, theirs, scanned)
    mesh = Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
    model = models.transformer_as_linen(config, mesh, quant=None, model_mode="train")
    arguments = TOKENS[None], jnp.arange(len(TOKENS))[None]
    rest = {"decoder_segment_ids": jnp.ones((1, len(TOKENS)), jnp.int32), "enable_dropout": False}

    with jax.set_mesh(mesh):
        made = nn.meta.unbox(model.init({"params": jax.random.key(0)}, *arguments, **rest))

    def logits(params) -> np.ndarray:
        with jax.set_mesh(mesh):
            out = jax.jit(functools.partial(model.apply, **rest))(params, *arguments)
        return np.asarray(out[0] if isinstance(out, tuple) else out)[0]

    return SimpleNamespace(
        config=config_from_hf(hf),
        params=disturbed(made),
        logits=logits,
        format="maxtext-scanned" if scanned else "maxtext",
    )


def test_what_maxtext_wrote_is_read(both, tmp_path):
    checkpointing.save_params_to_path(str(tmp_path / "0"), both.params)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(both.config, "float32")))
    read = checkpoints.load(tmp_path, skip_tokenizer=True)
    assert_alike(our_logits(read.config, read.params), both.logits(both.params))


def test_what_jpaged_wrote_is_read_by_maxtext(both, tmp_path):
    params = our_params(both.config)
    checkpoints.save(tmp_path / "x", both.config, params, format=both.format)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), both.params)
    restored = checkpointing.load_params_from_path(str(tmp_path / "x"), abstract, 8)
    assert_alike(our_logits(both.config, params), both.logits(restored))
