"""Everything that can be wrong with a checkpoint, as types; `checkpoints.load` raises nothing else for it."""

from collections.abc import Iterable


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded. The message says what was wrong and what to do."""


class CorruptCheckpointError(CheckpointError):
    """The file contradicts its own format: truncated, overlapping, out of range, or something else."""


class UnsupportedCheckpointError(CheckpointError):
    """The file may be fine, but jpaged does not read this format, version, quantisation or model family."""


class CheckpointNotFoundError(CheckpointError):
    """There is nothing at the given path, and no model of that name."""


class HubUnavailableError(CheckpointError):
    """The Hugging Face hub could not be reached, or refused the model."""


class MissingWeightsError(CheckpointError):
    """The checkpoint's tensors are not those that its configuration asks for.

    Attributes:
        missing: names that the model needs and the checkpoint lacks.
        surplus: names that the checkpoint holds and the model has no place for.
        misshapen: (name, expected shape, found shape).
    """

    def __init__(
        self,
        source: str,
        *,
        missing: Iterable[str] = (),
        surplus: Iterable[str] = (),
        misshapen: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]] = (),
    ) -> None:
        self.missing = tuple(missing)
        self.surplus = tuple(surplus)
        self.misshapen = tuple(misshapen)
        lines = [f"{source}: the tensors do not fit the configuration; is it the one of these weights?"]
        lines += [f"  missing: {name}" for name in self.missing]
        lines += [f"  surplus: {name}" for name in self.surplus]
        for name, expected, found in self.misshapen:
            lines.append(f"  misshapen: {name}: expected {list(expected)}, found {list(found)}")
        super().__init__("\n".join(lines))
