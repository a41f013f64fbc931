"""jpaged: PagedAttention and continuous batching in pure JAX.

    import jpaged

    llm = jpaged.LLM(model="smollm2-135m")
    outputs = llm.generate("The capital of France is", jpaged.SamplingParams(max_tokens=16))

The public names are imported when first touched, so that `import jpaged` costs nothing and the rooms
that need no JAX (`jpaged.memory`, `jpaged.scheduling`, `jpaged.models.config`) stay free of it.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jpaged.activations import capture
    from jpaged.async_engine import AsyncLLM
    from jpaged.config import EngineConfig
    from jpaged.engine import LLMEngine
    from jpaged.errors import JpagedError
    from jpaged.llm import LLM
    from jpaged.outputs import CompletionOutput, Logprob, RequestOutput
    from jpaged.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
    from jpaged.session import Session
    from jpaged.structured import StructuredOutputsParams

_HOME = {
    "capture": "jpaged.activations",
    "LLM": "jpaged.llm",
    "AsyncLLM": "jpaged.async_engine",
    "LLMEngine": "jpaged.engine",
    "EngineConfig": "jpaged.config",
    "SamplingParams": "jpaged.sampling_params",
    "BeamSearchParams": "jpaged.sampling_params",
    "Session": "jpaged.session",
    "StructuredOutputsParams": "jpaged.structured",
    "RequestOutputKind": "jpaged.sampling_params",
    "RequestOutput": "jpaged.outputs",
    "CompletionOutput": "jpaged.outputs",
    "Logprob": "jpaged.outputs",
    "JpagedError": "jpaged.errors",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "CompletionOutput",
    "EngineConfig",
    "JpagedError",
    "LLMEngine",
    "Logprob",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "Session",
    "StructuredOutputsParams",
    "capture",
]

__version__ = "0.1.0"


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'jpaged' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
