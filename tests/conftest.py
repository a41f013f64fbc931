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
