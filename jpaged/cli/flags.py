"""Flags from dataclasses: names, types, defaults and helps are those of `EngineConfig` and `SamplingParams`.

EngineFlags = flags_of(EngineConfig, "EngineFlags", defaults={"warmup": False})
config = build(EngineConfig, parsed_flags, max_num_seqs=4)
"""

import ast
import dataclasses
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Collection, Mapping
from typing import Annotated, Any

from tyro import conf

Switch = Annotated[bool, conf.FlagCreatePairsOff, conf.arg(help_behavior_hint="")]
"""A flag that is off unless it is given."""

NOT_FLAGS = (
    "detokenize",
    "output_kind",
    "logit_bias",
    "allowed_token_ids",
    "best_of",
    "use_beam_search",
    "structured_outputs",
    "prompt_logprobs",
    "seed",
)
"""Of SamplingParams: what the commands decide themselves, what takes more than a word to say; and the seed,
as --seed is the engine's, from which requests get theirs."""

_ALIASES = {"tensor_parallel_size": ("-tp",)}
"""Short names that users of vLLM know."""


def flags_of(
    source: type,
    name: str,
    *,
    leave_out: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
    helps: Mapping[str, str] | None = None,
) -> Any:
    """A dataclass for tyro with the fields of another.

    Args:
      source: a dataclass with a default for every field, and docstrings under them.
      name: of the new class.
      leave_out: fields that get no flag.
      defaults: defaults that differ from the source's.
      helps: help texts that differ from the source's docstrings.

    Returns: a dataclass type (a value, so that a type checker takes its instances as Any).
    """
    defaults, helps, hints = defaults or {}, helps or {}, typing.get_type_hints(source)
    docs = {**field_docs(source), **helps}
    unknown = {*leave_out, *defaults, *helps} - set(hints)
    if unknown:
        raise TypeError(f"{source.__name__} has no {', '.join(sorted(unknown))}")
    fields = [
        (
            f.name,
            Annotated[_one_type(hints[f.name]), conf.arg(help=docs.get(f.name), aliases=_ALIASES.get(f.name, ()))],
            dataclasses.field(default=defaults.get(f.name, f.default)),
        )
        for f in dataclasses.fields(source)
        if f.name not in leave_out
    ]
    made = dataclasses.make_dataclass(name, fields, frozen=True, kw_only=True)
    made.__doc__ = ""  # otherwise the signature, which would stand in the help
    return made


def named(command: type, name: str) -> Any:
    """A command as one of several, by this name; their list shows the first line of its docstring."""
    return Annotated[command, conf.subcommand(name, description=(command.__doc__ or "").splitlines()[0])]


def build(target: type, flags: Any, **changes: Any) -> Any:
    """An instance of the dataclass that the flags were made of.

    Args:
      target: `EngineConfig` or `SamplingParams`.
      flags: an instance of what `flags_of` returned for it.
      **changes: fields that are not as the flags have them.
    """
    return target(**{**{f.name: getattr(flags, f.name) for f in dataclasses.fields(flags)}, **changes})


def field_docs(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass; Python itself forgets them."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    body = typing.cast(ast.ClassDef, tree.body[0]).body
    docs = {}
    for field, below in itertools.pairwise(body):
        match field, below:
            case (ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text)))):
                docs[name] = inspect.cleandoc(text)
    return docs


def _one_type(hint: Any) -> Any:
    """`str | list[str] | tuple[str, ...]` says the same three times: a command line needs the tuple only. What is a
    structure, or its text, is text there."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = typing.get_args(hint)
        for member in members:
            if typing.get_origin(member) is tuple:
                return member
        if str in members and any(typing.get_origin(member) is dict for member in members):
            return str | None
    return hint
