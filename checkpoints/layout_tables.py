"""Other projects' parameter trees, as tables from our leaves to theirs.

Names, axes and value changes are those of the projects' own converters, read in their sources: MaxText's
`checkpoint_conversion/utils/param_mapping.py`, Tunix's `models/*/params.py` and `models/gemma3/params_safetensors.py`,
DeepMind gemma's `gm/nn/_modules.py` and `gm/ckpts/_compat.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from checkpoints.errors import UnsupportedCheckpointError
from checkpoints.layouts import Interleaved, Layout, Link, Path, Plus, Same, Scaled, Value
from checkpoints.leaves import Leaf
from checkpoints.tables import leaves_of
from jpaged.models.config import ModelConfig, MoEConfig

_PADDED_VOCABULARIES = {256000: 256128}
"""Vocabularies that MaxText pads: Gemma 2's."""

_GEMMA3_PATTERN = 6


def linen(config: ModelConfig) -> Layout:
    """Ours."""
    return [Link(path=leaf.path, shape=leaf.spec.shape, key=leaf.path) for leaf in leaves_of(config)]


def _refuse(what: str, config: ModelConfig, supported: dict[str, Any]) -> UnsupportedCheckpointError:
    return UnsupportedCheckpointError(
        f"{what} checkpoints of {config.model_type} are not supported; supported: {', '.join(supported)}"
    )


def _layer_of(leaf: Leaf) -> tuple[int | None, Path]:
    """(number of its layer, path below it); (None, path) outside of layers."""
    first, *rest = leaf.path
    return (int(first.removeprefix("layers_")), tuple(rest)) if first.startswith("layers_") else (None, leaf.path)


def _with_heads(config: ModelConfig, link: Link) -> Link:
    """q, k, v kernels and biases with heads apart: [E, N, D], [N, D]; o: [N, D, E]."""
    heads = {"q_proj": config.num_attention_heads, "o_proj": config.num_attention_heads}
    count, (module, kind) = heads.get(link.path[-2], config.num_key_value_heads), link.path[-2:]
    if module not in ("q_proj", "k_proj", "v_proj", "o_proj") or (module == "o_proj" and kind == "bias"):
        return link
    if module == "o_proj":
        return replace(link, split=(count, config.head_dim, link.shape[-1]))
    return replace(link, split=(*link.shape[:-1], count, config.head_dim))


# ------------------------------------------------------------------------------------------------------- MaxText

_ATTENTION = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}
_MLP = {"gate_proj": "wi_0", "up_proj": "wi_1", "down_proj": "wo"}
_NORMS = {
    "input_layernorm": "pre_self_attention_layer_norm",
    "post_attention_layernorm": "post_self_attention_layer_norm",
}
_GEMMA_NORMS = {
    "input_layernorm": "pre_self_attention_norm",
    "post_attention_layernorm": "post_self_attention_norm",
    "pre_feedforward_layernorm": "pre_ffw_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_EXPERTS = {"mixtral": "MoeBlock_0", "qwen3_moe": "moe_block"}


def _maxtext_name(config: ModelConfig, below: Path) -> Path:
    """A leaf's path below its layer."""
    norms = _GEMMA_NORMS if config.model_type.startswith("gemma") else _NORMS
    match below:
        case ("self_attn", ("q_norm" | "k_norm") as norm, kind):
            return ("self_attention", {"q": "query_norm", "k": "key_norm"}[norm[0]], kind)
        case ("self_attn", projection, kind):
            return ("self_attention", _ATTENTION[projection], kind)
        case ("mlp", "gate", kind):
            return (_EXPERTS[config.model_type], "gate", kind)
        case ("mlp", "experts", projection):
            return (_EXPERTS[config.model_type], _MLP[projection])
        case ("mlp", projection, kind):
            return ("mlp", _MLP[projection], kind)
        case (norm, kind):
            return (norms[norm], kind)
    raise KeyError(below)


def _maxtext_value(config: ModelConfig, leaf: Leaf) -> Value:
    gemma = config.model_type.startswith("gemma")
    interleaves = config.model_type == "llama" and config.rope is not None and config.rope.rope_type == "llama3"
    scales = config.model_type in ("llama", "mistral", "mixtral", "gemma2")
    if gemma and leaf.path[-1] == "scale":
        return Plus(1.0)
    if gemma and leaf.path[-1] == "embedding":
        return Scaled(config.hidden_size**0.5)
    if leaf.path[-2] in ("q_proj", "k_proj"):
        scaled = Scaled(config.head_dim**-0.5) if scales and leaf.path[-2] == "q_proj" else Same()
        return Interleaved(scaled) if interleaves else scaled
    return Same()


def _maxtext_layer(config: ModelConfig, index: int, name: Path, scanned: bool, expert: bool) -> tuple[Path, Any]:
    """(key, index along the layer axis or None) of a layer's leaf. The layer axis is 1."""

    def at(number: int) -> Any:
        return (None, number)

    if config.model_type == "gemma2":  # pairs of layers
        name = (f"{name[0]}_{'global' if index % 2 else 'local'}", *name[1:])
        return (("layers", *name), at(index // 2)) if scanned else ((f"layers_{index // 2}", *name), ())
    if not scanned:
        return (f"layers_{index}", *name), ()
    if config.model_type == "gemma3_text":
        turn, number = index % _GEMMA3_PATTERN, index // _GEMMA3_PATTERN
        if index < config.num_hidden_layers - config.num_hidden_layers % _GEMMA3_PATTERN:
            return ("layers", f"layers_{turn}", *name), at(number)
        return ("layers_remainder", f"layers_{turn}", *name), ()
    return ("layers", *name), at(index)


_MAXTEXT: dict[str, Any] = dict.fromkeys(
    ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text")
)


def maxtext(config: ModelConfig, *, scanned: bool) -> Layout:
    """MaxText's tree, below `params/params`.

    Raises:
        UnsupportedCheckpointError: another family; or layers that differ, scanned.
    """
    if config.model_type not in _MAXTEXT:
        raise _refuse("MaxText", config, _MAXTEXT)
    if isinstance(config, MoEConfig) and not all(config.is_sparse(i) for i in range(config.num_hidden_layers)):
        raise UnsupportedCheckpointError("MaxText checkpoints of models with some dense layers are not supported")
    return list(_maxtext_links(config, scanned))


def _maxtext_links(config: ModelConfig, scanned: bool) -> Iterator[Link]:
    vocabulary = _PADDED_VOCABULARIES.get(config.vocab_size, 0) if config.model_type == "gemma2" else 0
    for leaf in leaves_of(config):
        value = _maxtext_value(config, leaf)
        link = Link(path=leaf.path, shape=leaf.spec.shape, key=(), value=value)
        index, below = _layer_of(leaf)
        if index is not None:
            name = _maxtext_name(config, below)
            key, at = _maxtext_layer(config, index, name, scanned, "experts" in below)
            yield _with_heads(config, replace(link, key=("decoder", *key), at=at))
        elif leaf.path[0] == "embed_tokens":
            yield replace(link, key=("token_embedder", "embedding"), padded=0, pad_to=vocabulary)
        elif leaf.path[0] == "norm":
            yield replace(link, key=("decoder", "decoder_norm", "scale"))
        else:
            yield replace(link, key=("decoder", "logits_dense", "kernel"), padded=1, pad_to=vocabulary)


# --------------------------------------------------------------------------------------------------------- Tunix

_TUNIX: dict[str, Any] = dict.fromkeys(("llama", "qwen2", "qwen3", "gemma2", "gemma3_text"))


def tunix(config: ModelConfig) -> Layout:
    """Tunix's trees: Llama 3 and Qwen keep Hugging Face's modules, Gemma DeepMind's.

    Raises:
        UnsupportedCheckpointError: another family.
    """
    if config.model_type not in _TUNIX:
        raise _refuse("Tunix", config, _TUNIX)
    if config.model_type.startswith("gemma"):
        return [_tunix_gemma(config, leaf) for leaf in leaves_of(config)]
    return [_tunix(config, leaf) for leaf in leaves_of(config)]


def _tunix(config: ModelConfig, leaf: Leaf) -> Link:
    link = Link(path=leaf.path, shape=leaf.spec.shape, key=())
    index, below = _layer_of(leaf)
    if index is None:
        top = {
            "embed_tokens": ("embedder", "input_embedding"),
            "norm": ("final_norm", "w"),
            "lm_head": ("lm_head", "w"),
        }
        return replace(link, key=top[leaf.path[0]])
    layer: Path = ("layers", str(index))
    match below:
        case ("self_attn", projection, "bias"):
            return replace(link, key=(*layer, "attn", f"{projection[0]}_bias"))
        case ("self_attn", module, _):
            return _with_heads(config, replace(link, key=(*layer, "attn", module, "w")))
        case ("mlp", module, kind):
            return replace(link, key=(*layer, "mlp", module, kind))
    return replace(link, key=(*layer, below[0], "w"))


def _tunix_gemma(config: ModelConfig, leaf: Leaf) -> Link:
    link = _gemma(config, leaf, transposed=False)
    index, below = _layer_of(leaf)
    if index is None:
        return link
    layer: Path = ("layers", str(index))
    if below[0] == "mlp":  # kernels of their own, not fused
        return Link(path=leaf.path, shape=leaf.spec.shape, key=(*layer, "mlp", below[1], "kernel"))
    return replace(link, key=(*layer, *link.key[1:]))


# ------------------------------------------------------------------------------------------------ DeepMind gemma

_GEMMA: dict[str, Any] = dict.fromkeys(("gemma2", "gemma3_text"))
_DEEPMIND_NORMS = {
    "input_layernorm": "pre_attention_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "pre_ffw_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gemma(config: ModelConfig, *, transposed: bool, pattern: int = 0) -> Layout:
    """DeepMind gemma's tree, nested.

    Args:
        config: the model.
        transposed: `gating_einsum` is [2, F, E] instead of [2, E, F].
        pattern: if not 0: layers i, i + pattern, ... are stacked along axis 0 of `stacked_layers/attention_type_i`.

    Raises:
        UnsupportedCheckpointError: another family.
    """
    if config.model_type not in _GEMMA:
        raise _refuse("DeepMind gemma", config, _GEMMA)
    links = [_gemma(config, leaf, transposed) for leaf in leaves_of(config)]
    return [_stacked(link, pattern) for link in links] if pattern else links


def _stacked(link: Link, pattern: int) -> Link:
    stem, _, number = link.key[0].rpartition("_")
    if stem != "layer":
        return link
    key = ("stacked_layers", f"attention_type_{int(number) % pattern}", *link.key[1:])
    return replace(link, key=key, at=(int(number) // pattern, *link.at))


def _gemma(config: ModelConfig, leaf: Leaf, transposed: bool) -> Link:
    link = Link(path=leaf.path, shape=leaf.spec.shape, key=())
    index, below = _layer_of(leaf)
    if index is None:
        top = {"embed_tokens": ("embedder", "input_embedding"), "norm": ("final_norm", "scale")}
        return replace(link, key=top[leaf.path[0]])
    layer: Path = (f"layer_{index}",)
    fused = config.num_attention_heads == config.num_key_value_heads
    match below:
        case ("self_attn", ("q_norm" | "k_norm") as norm, kind):
            return replace(link, key=(*layer, "attn", "_query_norm" if norm == "q_norm" else "_key_norm", kind))
        case ("self_attn", "o_proj", _):
            return _with_heads(config, replace(link, key=(*layer, "attn", "attn_vec_einsum", "w")))
        case ("self_attn", projection, _):
            number = "qkv".index(projection[0])
            link = _with_heads(config, replace(link, axes=(1, 0, 2)))  # [E, N, D] -> [N, E, D]
            if fused:
                return replace(link, key=(*layer, "attn", "qkv_einsum", "w"), at=(number,))
            if number == 0:
                return replace(link, key=(*layer, "attn", "q_einsum", "w"))
            return replace(link, key=(*layer, "attn", "kv_einsum", "w"), at=(number - 1,))
        case ("mlp", "down_proj", _):
            return replace(link, key=(*layer, "mlp", "linear"))
        case ("mlp", projection, _):
            number, axes = ("gate_proj", "up_proj").index(projection), (1, 0) if transposed else ()
            return replace(link, key=(*layer, "mlp", "gating_einsum"), at=(number,), axes=axes)
    return replace(link, key=(*layer, _DEEPMIND_NORMS[below[0]], below[1]))


# ------------------------------------------------------------------------------------------------------ detection

ANCHORS: tuple[Path, ...] = (
    ("embed_tokens", "embedding"),
    ("token_embedder", "embedding"),
    ("embedder", "input_embedding"),
)
"""Where each layout keeps the embedding, by which it is found."""


def detect(config: ModelConfig, found: dict[Path, tuple[int, ...]]) -> tuple[str, Layout]:
    """The name and table of the layout of a tree.

    found: paths and shapes, from the tree's own root, as strings, `value` stripped.
    """
    firsts = {path[0] for path in found}
    seconds = {path[1] for path in found if len(path) > 1 and path[0] == "decoder"}
    if "embed_tokens" in firsts:
        return "Linen", linen(config)
    if "token_embedder" in firsts:
        scanned = bool({"layers", "layers_remainder"} & seconds)
        return f"MaxText ({'scanned' if scanned else 'unscanned'})", maxtext(config, scanned=scanned)
    if "layers" in firsts:
        return "Tunix", tunix(config)
    pattern = len({path[1] for path in found if path[0] == "stacked_layers"})
    gating = next((shape for path, shape in found.items() if path[-1] == "gating_einsum"), (0, 0))
    transposed = gating[-1] == config.hidden_size != gating[-2]
    return "DeepMind gemma", gemma(config, transposed=transposed, pattern=pattern)


class Written(NamedTuple):
    """A format of Orbax directories that we write."""

    below: Path
    """Where the tree lies."""
    table: Callable[[ModelConfig], Layout]
    item: str = "state"
    """Its name among the directory's checkpointables: other projects ask for theirs."""


WRITTEN = {
    "orbax": Written(("params",), linen),
    "nnx": Written((), linen),
    "maxtext": Written(("params", "params"), lambda config: maxtext(config, scanned=False), "items"),
    "maxtext-scanned": Written(("params", "params"), lambda config: maxtext(config, scanned=True), "items"),
    "tunix": Written((), tunix, "model_params"),
    "gemma": Written((), lambda config: gemma(config, transposed=False), "default"),
}
