import pytest

from jpaged.config import EngineConfig
from tests.engine.support import GOLDENS, EngineFactory, engine_factory


@pytest.fixture(scope="session")
def tiny() -> EngineFactory:
    """The tiny Llama with random weights: steps of about a millisecond."""
    return engine_factory(EngineConfig(
        model=str(GOLDENS / "models" / "llama"), max_num_seqs=8, max_model_len=256, prefill_tile_size=16, block_size=4,
        num_gpu_blocks_override=512, max_num_batched_tokens=72, warmup=False))


@pytest.fixture(scope="session")
def smollm2() -> EngineFactory:
    """SmolLM2-135M-Instruct in float32."""
    return engine_factory(EngineConfig(
        model="smollm2-135m", max_num_seqs=8, max_model_len=2048, num_gpu_blocks_override=700,
        max_num_batched_tokens=8 + 256, warmup=False))
