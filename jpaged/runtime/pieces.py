"""A function compiled in pieces: what it calls again and again is compiled once.

    whole:    [ before | layer | layer | layer | ... | after ]      one executable
    pieces:   [ before ]  [ six layers ] x L / 6  [ after ]         three executables, L / 6 + 2 calls

XLA:CPU gives each of a model's equal layers machine code and matrix-product graphs of its own: compiling, loading and
holding them takes as many times what one layer takes (docs/performance.md). The price is a few calls a step, which
the host makes ahead of the device. On GPU a step is one executable, whose launches are one graph.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

CALLS_A_PIECE = 6
"""A multiple of the periods at which families alternate their layers, so that pieces are alike. Few pieces, because
XLA:CPU makes the host wait when 32 calls are queued."""

FEWEST_CALLS = 4
"""Adjacent calls of one jitted function that are worth pieces."""


class Piece(NamedTuple):
    """One call. While the pieces run, values lie in numbered slots."""

    program: jax.stages.Compiled
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Pieces:
    """A compiled function; call it with what it was compiled for.

    Attributes:
      programs: its executables.
    """

    def __init__(self, traced: Any) -> None:
        """Compiles.

        Args:
          traced: `jax.jit(function, donate_argnums=...).trace(...)`. Values are donated to the last piece that reads
            them, if they were made by a piece or donated to the function.
        """
        jaxpr: Jaxpr = traced.jaxpr.jaxpr
        literals = [v for v in jaxpr.outvars if isinstance(v, Literal)]
        self._constants = [*traced.jaxpr.consts, *(v.val for v in literals)]
        given = (*jaxpr.invars, *jaxpr.constvars, *literals)
        self._slots = {id(v): slot for slot, v in enumerate(given)}
        donated = zip(jaxpr.invars, jax.tree.leaves(traced.args_info), strict=True)
        self._pieces = self._compile(jaxpr, {v for v, info in donated if info.donated})
        self._results = [self._slots[id(v)] for v in jaxpr.outvars]
        self._out_tree = jax.tree.structure(traced.out_info)
        self.programs = list({id(piece.program): piece.program for piece in self._pieces}.values())

    def __call__(self, *arguments: Any) -> Any:
        values = jax.tree.leaves(arguments)
        values += self._constants
        values += itertools.repeat(None, len(self._slots) - len(values))
        for program, inputs, outputs in self._pieces:
            for slot, value in zip(outputs, program(*[values[i] for i in inputs]), strict=True):
                values[slot] = value
        return jax.tree.unflatten(self._out_tree, [values[i] for i in self._results])

    def _compile(self, jaxpr: Jaxpr, owned: set[Var]) -> list[Piece]:
        """The pieces, in order. `owned`: variables whose memory may be used again."""
        runs = list(_split(jaxpr.eqns))
        last_use = {v: i for i, run in enumerate(runs) for v in _read(run)}
        last_use |= {v: len(runs) for v in jaxpr.outvars if not isinstance(v, Literal)}
        compiled: dict[Any, jax.stages.Compiled] = {}
        pieces = []
        for i, run in enumerate(runs):
            made = [v for equation in run for v in equation.outvars]
            inputs = [v for v in _read(run) if v not in set(made)]
            outputs = [v for v in made if last_use.get(v, i) > i]
            donated = _donatable([v for v in inputs if v in owned and last_use[v] == i], outputs)
            outputs = _beside(run, [v for v in inputs if v in donated], outputs)
            given_up = tuple(n for n, v in enumerate(inputs) if v in donated)
            key = _identity(run, inputs, outputs, given_up)
            if key not in compiled:
                part = jaxpr.replace(constvars=[], invars=inputs, outvars=outputs, eqns=run)
                piece = functools.partial(jax.core.eval_jaxpr, part, ())
                compiled[key] = jax.jit(piece, donate_argnums=given_up).lower(*map(_abstract, inputs)).compile()
            owned = owned.union(made)
            pieces.append(Piece(compiled[key], self._slots_of(inputs), self._slots_of(outputs)))
        return pieces

    def _slots_of(self, variables: list[Var]) -> tuple[int, ...]:
        return tuple(self._slots.setdefault(id(v), len(self._slots)) for v in variables)


def _split(equations: list[JaxprEqn]) -> Iterator[list[JaxprEqn]]:
    """Runs of equations: as many calls as make a piece, and what lies between them."""
    between: list[JaxprEqn] = []
    for name, adjacent in itertools.groupby(equations, lambda e: e.params["name"] if "jaxpr" in e.params else None):
        calls = list(adjacent)
        if name is None or len(calls) < FEWEST_CALLS:
            between += calls
            continue
        if between:
            yield between
            between = []
        yield from (calls[i : i + CALLS_A_PIECE] for i in range(0, len(calls), CALLS_A_PIECE))
    if between:
        yield between


def _read(run: list[JaxprEqn]) -> list[Var]:
    """What the equations read, each variable once."""
    return list(dict.fromkeys(v for equation in run for v in equation.invars if not isinstance(v, Literal)))


def _abstract(variable: Var) -> jax.ShapeDtypeStruct:
    aval: Any = variable.aval
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _donatable(candidates: list[Var], outputs: list[Var]) -> set[Var]:
    """Those whose memory an output can take."""
    left = [_abstract(v) for v in outputs]
    taken = set()
    for v in candidates:
        if (shape := _abstract(v)) in left:
            left.remove(shape)
            taken.add(v)
    return taken


def _beside(run: list[JaxprEqn], donated: list[Var], outputs: list[Var]) -> list[Var]:
    """The outputs, those first that are later versions of donated inputs, in the order of these.

    Of equal shapes, the first donated input's memory becomes the first output: another order would cost copies.
    """
    versions = {v: i for i, v in enumerate(donated)}
    for equation in run:
        for made in equation.outvars:
            like = [v for v in equation.invars if not isinstance(v, Literal) and _abstract(v) == _abstract(made)]
            if len(like) == 1 and like[0] in versions:
                versions[made] = versions[like[0]]
    return sorted(outputs, key=lambda v: versions.get(v, len(donated)))


def _identity(run: list[JaxprEqn], inputs: list[Var], outputs: list[Var], donated: tuple[int, ...]) -> Any:
    """Equal for runs that one executable serves: calls of the same jaxprs, wired alike."""
    if not all("jaxpr" in equation.params for equation in run):
        return id(run[0])
    numbers = {v: i for i, v in enumerate((*inputs, *(v for equation in run for v in equation.outvars)))}
    calls = [
        (id(equation.params["jaxpr"]), *(str(v) if isinstance(v, Literal) else numbers[v] for v in equation.invars))
        for equation in run
    ]
    return *calls, *(numbers[v] for v in outputs), donated
