"""From nothing to a served model in one process: optax trains a byte-level Llama, Orbax saves it, jpaged serves it.

    uv run --group examples python docs/examples/train_and_serve.py

The text is this repository's own. Half-way the parameters are saved, and an engine serves them from the checkpoint.
Training goes on; in the end the live parameters take over in the middle of a request, without a copy or a compile.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from orbax.checkpoint import v1

from jpaged import LLMEngine, SamplingParams
from jpaged.models.config import config_from_hf
from jpaged.models.registry import build

ROOT = Path(__file__).parents[2]
HF_CONFIG = {  # as in a Hugging Face config.json: tokens are bytes
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
PROMPT = "A block table "


def read_text() -> np.ndarray:
    files = sorted(path for folder in ("docs", "jpaged") for path in (ROOT / folder).rglob("*.[mp][dy]"))
    return np.frombuffer("\n".join(path.read_text() for path in files).encode(), np.uint8)


def batches(text: np.ndarray, size: int, length: int) -> Iterator[np.ndarray]:
    """Random pieces of the text, int32 [size, length + 1]."""
    draw = np.random.default_rng(0)
    while True:
        starts = draw.integers(0, len(text) - length - 1, size)
        yield text[starts[:, None] + np.arange(length + 1)].astype(np.int32)


def make_update(model, optimizer: optax.GradientTransformation):
    def loss(params, tokens):
        logits = model.apply({"params": params}, tokens[:, :-1], method="forward_logits")
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @jax.jit
    def update(params, state, tokens):
        value, gradients = jax.value_and_grad(loss)(params, tokens)
        changes, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, changes), state, value

    return update


def save(folder: Path, params) -> Path:
    """An Orbax checkpoint of the parameters, with the config.json that says what they are."""
    (folder / "config.json").write_text(json.dumps(HF_CONFIG))
    v1.save(folder / "params", params)
    return folder / "params"


def finish(engine: LLMEngine, steps: int | None = None) -> str:
    """Runs the engine, for so many steps or until all is done; the text of what has ended."""
    text = ""
    while engine.has_unfinished_requests() and steps != 0:
        for output in engine.step():
            if output.finished:
                text = bytes(output.prompt_token_ids + output.outputs[0].token_ids).decode(errors="replace")
        steps = None if steps is None else steps - 1
    return text


def request(engine: LLMEngine, name: str, length: int) -> None:
    prompt = {"prompt_token_ids": list(PROMPT.encode())}
    engine.add_request(name, prompt, SamplingParams(temperature=0.5, seed=1, max_tokens=length, ignore_eos=True))


def train_and_serve(
    folder: Path, steps: int, *, size: int = 16, length: int = 128, answer: int = 160, show=print
) -> tuple[list[float], LLMEngine]:
    """Returns (the loss of each step, in nats a byte; the engine that serves the last parameters)."""
    model = build(config_from_hf(HF_CONFIG), jnp.dtype("float32"))
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), method="forward_logits")["params"]
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, 3e-3, steps // 10 + 1, steps + 1), weight_decay=0.1)
    update, state = make_update(model, optimizer), optimizer.init(params)
    losses, start, engine = [], time.monotonic(), None
    for step, tokens in zip(range(1, steps + 1), batches(read_text(), size, length), strict=False):
        params, state, loss = update(params, state, tokens)
        losses.append(float(loss))
        if step % max(steps // 10, 1) == 0:
            show(f"step {step:4}   loss {losses[-1]:.3f}   {time.monotonic() - start:.0f} s")
        if step == steps // 2:
            path = save(folder, params)
            engine = LLMEngine(model=str(path), max_num_seqs=2, num_gpu_blocks_override=64, warmup=False)
            request(engine, "half-way", answer)
            show(f"\nserved from {path.name}, half-way:\n{finish(engine)}\n")
    assert engine is not None  # noqa: S101  # there are two steps at least
    request(engine, "live", answer)
    finish(engine, answer // 4)
    version = engine.update_weights(params)  # the request goes on, with keys and values of the new weights
    show(f"\na quarter from the checkpoint, the rest from the live parameters (version {version}):\n{finish(engine)}")
    return losses, engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    with tempfile.TemporaryDirectory() as folder:
        train_and_serve(Path(folder), parser.parse_args().steps)


if __name__ == "__main__":
    main()
