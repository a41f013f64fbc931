"""GroupMaker: a request becomes a group of sequences; a new one, or one that goes on from a record."""

from typing import Any

from jpaged.companions import companion_of
from jpaged.errors import InvalidRequestError, SnapshotError
from jpaged.outputs import RequestMetrics
from jpaged.request_limits import RequestLimits
from jpaged.sampling_params import SamplingParams
from jpaged.scheduling.beams import new_search
from jpaged.sequence import Sequence, SequenceGroup
from jpaged.snapshots.records import AS_THEY_ARE, RequestRecord, refill
from jpaged.structured import Grammars

_SEED_MASK = (1 << 64) - 1


class GroupMaker:
    """Makes groups that wait.

    Args:
      limits: of the engine.
    """

    def __init__(self, limits: RequestLimits) -> None:
        self._limits = limits
        self._grammars: Grammars | None = None

    @property
    def grammars(self) -> Grammars:
        """Compiled grammars; see `LLMEngine.grammars`."""
        if self._grammars is None:
            limits = self._limits
            if limits.tokenizer is None or not limits.eos_token_ids:
                raise InvalidRequestError(
                    "structured_outputs need a tokenizer and an end-of-sequence token, and this engine lacks one."
                )
            self._grammars = Grammars(limits.tokenizer, limits.vocab_size, limits.eos_token_ids)
        return self._grammars

    def end_compiling(self) -> None:
        """Gives up the grammars that are being compiled."""
        if self._grammars is not None:
            self._grammars.close()

    def new(self, request_id: str, tokens: list[int], params: SamplingParams, seed: int, **known: Any) -> SequenceGroup:
        """A new request's.

        Args:
          tokens: the prompt's.
          seed: of a request that brings none.
          known: other fields of `SequenceGroup`.

        Raises:
          InvalidRequestError: its structured_outputs can't be had.
        """
        most = self._limits.max_model_len
        wanted = most if params.max_tokens is None else len(tokens) + params.max_tokens
        seed = (seed if params.seed is None else params.seed) & _SEED_MASK
        return self._make(
            min(wanted, most), request_id=request_id, prompt_token_ids=tokens, params=params, seed=seed, **known
        )

    def again(self, record: RequestRecord) -> SequenceGroup:
        """A group as its record has it.

        Raises:
          SnapshotError: this engine can't go on with it.
        """
        if record.max_length > (most := self._limits.max_model_len):
            raise SnapshotError(
                f"request {record.request_id!r} of the snapshot may grow to {record.max_length} tokens, and here "
                f"max_model_len is {most}: raise it."
            )
        kept = {name: getattr(record, name) for name in AS_THEY_ARE}
        try:
            group = self._make(record.max_length, metrics=RequestMetrics(arrival_time=0), **kept)
        except InvalidRequestError as error:
            raise SnapshotError(f"request {record.request_id!r} of the snapshot can't go on here: {error}") from error
        refill(group, record)
        return group

    def _make(self, max_length: int, **fields: Any) -> SequenceGroup:
        group = SequenceGroup(**fields)
        params = group.params
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._limits.eos_token_ids)
        group.sequences = [
            Sequence(group, i, list(group.prompt_token_ids), max_length, stops) for i in range(params.num_sequences)
        ]
        constraint = params.structured_outputs
        matcher = None if constraint is None else self.grammars.matcher(constraint)
        if params.use_beam_search:
            group.beams = new_search(group, companion_of(group, matcher, self._limits.tokenizer))
        elif matcher is not None:
            for sequence in group.sequences:
                sequence.matcher = matcher.fork()
        return group
