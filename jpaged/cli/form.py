"""Flags for the form of an output: those of `StructuredOutputsParams`, on one line of a shell."""

import dataclasses
from pathlib import Path
from typing import Annotated

from tyro import conf

from jpaged.cli.flags import Switch
from jpaged.errors import InvalidRequestError
from jpaged.structured.params import StructuredOutputsParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class FormFlags:
    """The form of an answer: at most one of them."""

    json_schema: Annotated[str | None, conf.arg(metavar="SCHEMA")] = None
    """The answer is JSON that this schema allows: its text, or @FILE."""
    regex: str | None = None
    """The whole answer matches this regular expression (Rust's syntax, no anchors)."""
    choice: tuple[str, ...] = ()
    """The answer is one of these; the flag is given once for each."""
    grammar: str | None = None
    """The answer follows this grammar (Lark, or GBNF): its text, or @FILE."""
    json_object: Switch = False
    """The answer is any JSON object."""

    def params(self) -> StructuredOutputsParams | None:
        """None: any form.

        Raises:
          InvalidRequestError: it is no form, there are two, or a file can't be read.
        """
        given = {
            "json": _text(self.json_schema),
            "regex": self.regex,
            "choice": self.choice or None,
            "grammar": _text(self.grammar),
            "json_object": self.json_object or None,
        }
        given = {name: value for name, value in given.items() if value is not None}
        return StructuredOutputsParams(**given) if given else None  # type: ignore[arg-type]


def _text(given: str | None) -> str | None:
    """What a flag says, or the file that it names."""
    if given is None or not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{given}: {error}") from error
