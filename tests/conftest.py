"""Settings and fixtures for all tests."""

import os

import hypothesis
import pytest

# Repeatable by default. HYPOTHESIS_PROFILE=explore looks further, and elsewhere each time.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session")
def smollm2_tokenizer():
    """The tokenizer of SmolLM2-135M-Instruct, without its weights."""
    from checkpoints.gguf import GGUFFile
    from checkpoints.gguf_tokenizer import tokenizer_from_gguf
    from checkpoints.loader import resolve

    return tokenizer_from_gguf(GGUFFile(resolve("smollm2-135m")))


@pytest.fixture(scope="session")
def tiny():
    """Engines over the tiny Llama with random weights: steps of about a millisecond. See `tests.engine.support`."""
    from jpaged.config import EngineConfig
    from tests.engine.support import GOLDENS, engine_factory

    return engine_factory(
        EngineConfig(
            model=str(GOLDENS / "models" / "llama"),
            max_num_seqs=8,
            max_model_len=256,
            prefill_tile_size=16,
            block_size=4,
            num_gpu_blocks_override=512,
            max_num_batched_tokens=72,
            warmup=False,
        )
    )


@pytest.fixture(scope="session")
def smollm2():
    """Engines over SmolLM2-135M-Instruct in float32."""
    from jpaged.config import EngineConfig
    from tests.engine.support import engine_factory

    return engine_factory(
        EngineConfig(
            model="smollm2-135m",
            max_num_seqs=8,
            max_model_len=2048,
            num_gpu_blocks_override=700,
            max_num_batched_tokens=8 + 256,
            warmup=False,
        )
    )
