"""Activations of chosen layers, captured while an engine generates.

    with jpaged.capture(llm, layers=[3, 7], sites=("residual", "attention")) as record:
        [output] = llm.generate(prompt, params)
    seen = record[output.request_id]
    seen.positions, seen["residual"]        # int64 [T], float32 [T, 2, E]

The forward pass of a step returns what was asked for beside its results, and the host sorts it by request and
position. An engine that nobody captures from runs the programs that it always runs.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from jpaged.engine import LLMEngine
from jpaged.errors import InvalidConfigError
from jpaged.llm import LLM
from jpaged.models.causal_lm import SITES, Capture
from jpaged.scheduling import StepPlan
from jpaged.sequence import Sequence, SequenceGroup

Token = tuple[str, int | None, int]
"""Request, sample (None: the prompt, which all samples share), position."""


@dataclasses.dataclass(frozen=True)
class Activations:
    """What was captured of one sequence."""

    positions: np.ndarray  # int64 [T], ascending
    sites: dict[str, np.ndarray]  # float32 [T, layers, E], layers in the order in which they were asked for

    def __getitem__(self, site: str) -> np.ndarray:
        return self.sites[site]


class Record:
    """What was captured, by request: `record[request_id]` is its first sample, `record[request_id, i]` sample i.

    The last token of an output is sampled and not computed, so it is absent, and so are positions whose keys and values
    a session had already.
    """

    def __init__(self, capture: Capture, tile_size: int) -> None:
        self.capture = capture
        self._tile_size = tile_size
        self._seen: dict[Token, np.ndarray] = {}  # [sites, layers, E]
        self._groups: dict[str, SequenceGroup] = {}
        self._waiting: list[tuple[list[Token | None], jax.Array]] = []

    def __getitem__(self, request: str | tuple[str, int]) -> Activations:
        """Raises KeyError: nothing was captured of it."""
        self._read(0)
        request_id, sample = (request, 0) if isinstance(request, str) else request
        if request_id not in self._groups:
            raise KeyError(request)
        # A step that was under way when its sequence ended has computed the last token, too: sometimes.
        end = len(self._groups[request_id].sequences[sample].tokens) - 1
        mine = (t for t in self._seen if t[0] == request_id and t[1] in (None, sample) and t[2] < end)
        tokens = sorted(mine, key=lambda token: token[2])
        stacked = np.stack([self._seen[token] for token in tokens], axis=1)  # [sites, T, layers, E]
        sites = dict(zip(self.capture.sites, stacked, strict=True))
        return Activations(np.array([position for _, _, position in tokens]), sites)

    @property
    def request_ids(self) -> list[str]:
        return list(self._groups)

    def add(self, plan: StepPlan, captured: jax.Array) -> None:
        """Takes a launched step's activations, [tokens of the bucket, sites, layers, E]."""
        tokens: list[Token | None] = [None] * captured.shape[0]
        for i, (sequence, position) in enumerate(zip(plan.sequences, plan.positions.tolist(), strict=True)):
            tokens[i] = self._token(sequence, position)
        for i, tile in enumerate(plan.tiles):
            first = plan.bucket.decode_rows + i * self._tile_size
            for offset in range(tile.length):
                tokens[first + offset] = self._token(tile.sequence, tile.start + offset)
        captured.copy_to_host_async()
        self._waiting.append((tokens, captured))
        self._read(2)  # the engine is a step ahead of the device: older ones are done

    def _read(self, leave: int) -> None:
        while len(self._waiting) > leave:
            tokens, captured = self._waiting.pop(0)
            values = np.asarray(captured)
            # Copies: a view would keep the padding alive. What is computed again overwrites.
            self._seen.update({token: value.copy() for token, value in zip(tokens, values, strict=True) if token})

    def _token(self, sequence: Sequence, position: int) -> Token:
        group = sequence.group
        self._groups[group.request_id] = group
        return group.request_id, None if position < len(group.prompt_token_ids) else sequence.index, position


@contextlib.contextmanager
def capture(llm: LLM | LLMEngine, layers: list[int], sites: tuple[str, ...] = ("residual",)) -> Iterator[Record]:
    """Captures activations of all requests that are added while it lasts.

    They don't look into the prefix cache, so that all their positions are computed. Each step shape compiles once for
    each choice of layers and sites.

    Args:
      llm: or an engine.
      layers: which, from 0 on; negative ones count from the end.
      sites: "residual": the residual stream after the layer; "attention" and "mlp": what these modules return, before
        it is normed, scaled or added to the stream.

    Raises:
      InvalidConfigError: there is no such layer or site.
      InvalidRequestError: by `generate`, for beam search: its beams change places.
    """
    engine = llm.engine if isinstance(llm, LLM) else llm
    count, runner = engine.model_config.num_hidden_layers, engine.runner
    if not layers or not all(-count <= layer < count for layer in layers):
        raise InvalidConfigError(f"layers={list(layers)} must be some of {-count} to {count - 1}.")
    if not sites or not set(sites) <= set(SITES):
        raise InvalidConfigError(f"sites={list(sites)} must be some of {', '.join(SITES)}.")
    if runner.capture is not None or engine.num_unfinished_requests:
        raise InvalidConfigError("this engine is at work, or captured from already: begin when it is idle.")
    record = Record(Capture(tuple(sites), tuple(layer % count for layer in layers)), runner.tile_size)
    ignore, runner.on_captured = runner.on_captured, record.add
    runner.capture = record.capture
    try:
        yield record
    finally:
        runner.capture, runner.on_captured = None, ignore
