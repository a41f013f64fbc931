"""jpaged convert: a checkpoint in another format."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from tyro import conf

from jpaged.cli.flags import Switch
from jpaged.progress import Progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a checkpoint in another format, bit by bit the same model.

    The directory appears under its name when it is complete, or not at all.
    """

    source: conf.Positional[Annotated[str, conf.arg(metavar="SRC")]]
    """What to read: a folder of safetensors, a .gguf file, an Orbax directory, a hub id or a short name."""
    target: conf.Positional[Annotated[Path, conf.arg(metavar="DST")]]
    """The directory to make."""
    format: Literal["safetensors", "orbax", "nnx", "maxtext", "maxtext-scanned", "tunix", "gemma"]
    """safetensors: a Hugging Face folder. The others are Orbax directories: orbax holds Linen parameters, nnx the same
    as an NNX state, and the rest the trees of MaxText, Tunix and DeepMind's gemma."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Element type to write; auto: the source's (float32 if it is quantised)."""
    overwrite: Switch = False
    """Replace what is at DST."""

    def run(self) -> int:
        import checkpoints

        with Progress("converting", unit="B") as progress:
            done = checkpoints.convert(
                self.source,
                self.target,
                format=self.format,
                dtype=self.dtype,
                overwrite=self.overwrite,
                progress=progress.weights,
            )
        print(f"{done.source} -> {self.target}")
        print(f"{done.model_type}, {done.parameters:,} parameters, {done.dtype}, written as {self.format}:")
        print("  " + ", ".join(done.files))
        return 0
