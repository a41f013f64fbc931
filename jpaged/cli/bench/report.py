"""What the benchmarks share: prompts of random tokens, percentiles, and where the result goes."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import jpaged
from jpaged.cli.flags import Switch
from jpaged.errors import InvalidConfigError

if TYPE_CHECKING:
    from jpaged.engine import LLMEngine
    from jpaged.sampling_params import SamplingParams
    from jpaged.tokenization import TokensPrompt

PERCENTAGES = (10, 25, 50, 75, 90, 99)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Destination:
    """Where a result goes."""

    json: Switch = False
    """Write the result to standard output as one JSON object."""
    output: Path | None = None
    """Write the JSON object to this file too."""

    def check(self) -> None:
        """Refuses a file that can't be written before the measurement and not after it."""
        if self.output is not None and (self.output.is_dir() or not self.output.absolute().parent.is_dir()):
            raise InvalidConfigError(f"--output {self.output}: not a file in an existing folder.")

    def give(self, result: dict[str, Any] | list[dict[str, Any]], lines: list[str]) -> None:
        """Writes a result, for a machine or as lines for a person."""
        text = json.dumps(result, indent=2)
        if self.output is not None:
            try:
                self.output.write_text(text + "\n")
            except OSError as error:
                raise InvalidConfigError(f"--output {self.output}: {error.strerror}.") from error
        print(text if self.json else "\n".join(lines))


def environment(model: str) -> dict[str, Any]:
    """What every result says about where it comes from."""
    import jax

    return {
        "backend": "jpaged",
        "jpaged_version": jpaged.__version__,
        "jax_version": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "model_id": model,
    }


def percentiles(values: list[float]) -> dict[str, float]:
    return {str(p): float(np.percentile(values, p)) for p in PERCENTAGES}


def random_prompts(lengths: list[int], vocab_size: int, seed: int) -> list["TokensPrompt"]:
    """Prompts of so many tokens each, drawn over the whole vocabulary; no two begin alike."""
    random = np.random.default_rng(seed)
    return [{"prompt_token_ids": random.integers(0, vocab_size, length).tolist()} for length in lengths]


def check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise InvalidConfigError(f"--{name.replace('_', '-')} {count}: at least 1 is needed.")


def check_lengths(engine: "LLMEngine", input_len: int, output_len: int) -> None:
    """Otherwise the engine would end the answers early, and fewer tokens would be measured than asked for."""
    if input_len + output_len > engine.max_model_len:
        raise InvalidConfigError(
            f"{input_len} prompt tokens and {output_len} output tokens do not fit into "
            f"max_model_len={engine.max_model_len}."
        )


def fixed_length(output_len: int) -> "SamplingParams":
    """Greedy, exactly so many tokens, no text."""
    from jpaged.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        temperature=0.0,
        max_tokens=output_len,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
