"""OutputProcessor: from committed tokens to `RequestOutput`s: text, stop strings, log-probabilities."""

import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from jpaged.outputs import CompletionOutput, Logprob, LogprobsAt, RequestOutput
from jpaged.sampling_params import RequestOutputKind, SamplingParams
from jpaged.scheduling import StepPlan
from jpaged.sequence import FinishReason, Sequence, SequenceGroup
from jpaged.tokenization import Detokenizer, find_stop, held_back

if TYPE_CHECKING:
    from jpaged.tokenization import Tokenizer


@dataclasses.dataclass(slots=True)
class _Shown:
    """What the user has been given of a sequence (output_kind DELTA), and its text so far."""

    detokenizer: Detokenizer | None
    num_pushed: int = 0
    final_text: str | None = None
    num_tokens: int = 0
    num_chars: int = 0


class OutputProcessor:
    """Follows the requests of an engine from their first token to their last.

    Args:
      tokenizer: None: outputs have no text.
      stop: called with a sequence and the stop string that its text contains.
    """

    def __init__(self, tokenizer: "Tokenizer | None", stop: Callable[[Sequence, str], None]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._shown: dict[Sequence, _Shown] = {}

    def process(
        self,
        plan: StepPlan,
        received: list[Sequence],
        results: np.ndarray,
        prompt_scores: np.ndarray | None,
        pooled: np.ndarray | None,
    ) -> list[RequestOutput]:
        """The outputs that one step's results give rise to.

        Args:
          received: the sequences that got a token.
          results: int32 [N, columns] as `runtime.sampler.sample` returns them.
          prompt_scores: int32 [P * C, columns], or None.
          pooled: float32 [P, E], or None.
        """
        if prompt_scores is not None:
            self._take_prompt_scores(plan, prompt_scores)
        if pooled is not None:
            _take_pooled(plan, pooled)
        if plan.variant.num_logprobs >= 0:
            self._take_logprobs(plan, set(received), results)
        now = time.monotonic()
        touched: dict[SequenceGroup, None] = {}
        for sequence in received:
            group = sequence.group
            if group.metrics.first_token_time is None:
                group.metrics.first_token_time = now
            if group.params.stop:
                self._look_for_stop(sequence)
            if group.finished or _streams(group.params):
                touched[group] = None
        return [self.output(group) for group in touched]

    def output(self, group: SequenceGroup) -> RequestOutput:
        """A group's output as its `output_kind` has it; a finished group is forgotten."""
        if group.finished:
            group.metrics.finished_time = time.monotonic()
        for sequence in group.sequences:
            self._take_beam_logprobs(sequence)
        sequences = group.sequences
        if group.params.ranks_samples:
            sequences = sorted(sequences, key=lambda s: -s.cumulative_logprob)[: group.params.n]
        outputs = [self._completion(sequence, index) for index, sequence in enumerate(sequences)]
        if group.finished:
            for sequence in group.sequences:
                self._shown.pop(sequence, None)
        return RequestOutput(
            request_id=group.request_id,
            prompt=group.prompt,
            prompt_token_ids=group.prompt_token_ids,
            prompt_logprobs=group.prompt_logprobs,
            outputs=outputs,
            finished=group.finished,
            metrics=group.metrics,
            num_cached_tokens=group.num_cached_tokens,
            embedding=group.embedding,
        )

    def stopped_text(self, sequence: Sequence) -> str | None:
        """The whole text of a sequence that a stop string has ended; None for all others."""
        shown = self._shown.get(sequence)
        return None if shown is None else shown.final_text

    def restore(self, group: SequenceGroup, stopped_texts: list[str | None]) -> None:
        """What `stopped_text` was in another process, for each sequence. All other text follows from the tokens."""
        for sequence, text in zip(group.sequences, stopped_texts, strict=True):
            if text is not None:
                self._state(sequence).final_text = text

    def _completion(self, sequence: Sequence, index: int) -> CompletionOutput:
        params, shown = sequence.group.params, self._state(sequence)
        text, tokens = self._text(sequence), sequence.output_token_ids
        ranked = params.ranks_samples or params.use_beam_search
        logprobs = sequence.logprobs if params.logprobs is not None else None
        if params.output_kind is RequestOutputKind.DELTA:
            text_end, tokens_end = len(text), len(tokens)
            text, tokens = text[shown.num_chars :], tokens[shown.num_tokens :]
            logprobs = None if logprobs is None else logprobs[shown.num_tokens :]
            shown.num_chars, shown.num_tokens = text_end, tokens_end
        return CompletionOutput(
            index=index,
            text=text,
            token_ids=tokens,
            cumulative_logprob=sequence.cumulative_logprob if ranked or params.logprobs is not None else None,
            logprobs=None if logprobs is None else list(logprobs),
            finish_reason=None if sequence.finish_reason is None else str(sequence.finish_reason),
            stop_reason=sequence.stop_reason,
            weights_version=sequence.weights_version,
            score=sequence.score,
        )

    # -------------------------------------------------------------------------------------------------- text

    def _state(self, sequence: Sequence) -> _Shown:
        shown = self._shown.get(sequence)
        if shown is None:
            group = sequence.group
            detokenizer = None
            if self._tokenizer is not None and group.params.detokenize:
                detokenizer = Detokenizer(self._tokenizer, group.prompt_token_ids, group.params.skip_special_tokens)
            shown = self._shown[sequence] = _Shown(detokenizer)
        return shown

    def _advance(self, sequence: Sequence) -> tuple[Detokenizer | None, int]:
        """Detokenises what is new; returns how many characters that gave."""
        shown = self._state(sequence)
        if shown.detokenizer is None:
            return None, 0
        first = len(sequence.group.prompt_token_ids) + shown.num_pushed
        new = sequence.tokens[first:]
        shown.num_pushed += len(new)
        by_token = sequence.finish_reason is FinishReason.STOP and not isinstance(sequence.stop_reason, str)
        if by_token and not sequence.group.params.include_stop_str_in_output:
            new = new[:-1]  # the token that ended it is not part of the text
        return shown.detokenizer, len(shown.detokenizer.push(new))

    def _look_for_stop(self, sequence: Sequence) -> None:
        detokenizer, new = self._advance(sequence)
        if detokenizer is None or not new:
            return
        params = sequence.group.params
        found = find_stop(detokenizer.text, new, params.stop)  # type: ignore[arg-type]  # normalised to a tuple
        if found is not None:
            at, stop = found
            shown = self._state(sequence)
            shown.final_text = detokenizer.text[: at + len(stop) if params.include_stop_str_in_output else at]
            self._stop(sequence, stop)

    def _text(self, sequence: Sequence) -> str:
        shown = self._state(sequence)
        if shown.final_text is not None:
            return shown.final_text
        detokenizer, _ = self._advance(sequence)
        if detokenizer is None:
            return ""
        if sequence.finished:
            detokenizer.finish()
            return detokenizer.text
        stops: tuple[str, ...] = sequence.group.params.stop  # type: ignore[assignment]
        return detokenizer.text[: len(detokenizer.text) - held_back(detokenizer.text, stops)]

    # ----------------------------------------------------------------------------------------- log-probabilities

    def _take_logprobs(self, plan: StepPlan, received: set[Sequence], results: np.ndarray) -> None:
        guessed = plan.guessed
        for i, (sequence, result) in enumerate(zip(plan.sampling, results, strict=False)):  # results are padded
            params = sequence.group.params
            if sequence not in received or sequence.group.beams is not None:
                continue
            if i in guessed and guessed[i][0] + 1 >= len(sequence.tokens):
                continue  # a guess was wrong
            if params.logprobs is not None:
                sequence.logprobs.append(self._logprobs_at(*_chosen(result), result, params.logprobs))
            if params.logprobs is not None or params.ranks_samples:
                sequence.cumulative_logprob += _chosen(result)[1]

    def _take_beam_logprobs(self, sequence: Sequence) -> None:
        """Log-probabilities of a beam search's result: its parents' results, with what the search chose from them."""
        wanted = sequence.group.params.logprobs
        for result, token, logprob in sequence.chosen:
            best = result[3 : 3 + (len(result) - 3) // 2].tolist()
            rank = best.index(token) + 1 if token in best else None
            sequence.logprobs.append(self._logprobs_at(token, logprob, rank, result, wanted or 0))
        sequence.chosen = []

    def _take_prompt_scores(self, plan: StepPlan, scores: np.ndarray) -> None:
        size = len(scores) // plan.bucket.prefill_tiles
        for i, (sequence, _, start, length, _) in enumerate(plan.tiles):
            group = sequence.group
            wanted, prompt = group.params.prompt_logprobs, group.prompt_token_ids
            if wanted is None or sequence.index != 0:
                continue
            if group.prompt_logprobs is None:
                group.prompt_logprobs = [None] * max(group.readout.scored_from, 1)  # nothing predicts the first token
            known = group.prompt_logprobs
            for j in range(length):
                # After a preemption the first positions come again: only what is next is taken.
                if start + j + 1 == len(known) and len(known) < len(prompt):
                    result = np.concatenate([[prompt[len(known)]], scores[i * size + j]]).astype(np.int32)
                    known.append(self._logprobs_at(*_chosen(result), result, wanted))

    def _logprobs_at(self, token: int, logprob: float, rank: int | None, result: np.ndarray, wanted: int) -> LogprobsAt:
        """A result's log-probabilities as a dict: the chosen token first, then the most likely ones."""
        at = {token: Logprob(logprob, rank, self._decode(token))}
        width = (len(result) - 3) // 2
        best, logprobs = result[3 : 3 + width].tolist(), result[3 + width :].view(np.float32).tolist()
        for k in range(wanted):
            if best[k] != token:
                at[best[k]] = Logprob(logprobs[k], k + 1, self._decode(best[k]))
        return at

    def _decode(self, token: int) -> str | None:
        return (
            None
            if self._tokenizer is None
            else self._tokenizer.backend_tokenizer.decode([token], skip_special_tokens=False)
        )


def _take_pooled(plan: StepPlan, pooled: np.ndarray) -> None:
    """Adds each tile's part to its prompt's embedding. What is computed from the beginning again begins again."""
    for tile, part in zip(plan.tiles, pooled, strict=False):  # tiles are padded
        group = tile.sequence.group
        if group.readout.pooling is None or tile.sequence.index != 0 or tile.start >= len(group.prompt_token_ids):
            continue
        adds = group.readout.pooling == "mean" and tile.start > 0
        group.embedding = group.embedding + part if adds else part  # type: ignore[operator]  # tile 0 came before


def _streams(params: SamplingParams) -> bool:
    """Whether a request's output is of interest before its end; what is ranked at the end is not."""
    return params.output_kind is not RequestOutputKind.FINAL_ONLY and not params.ranks_samples


def _chosen(result: np.ndarray) -> tuple[int, float, int]:
    """(token, log-probability, rank) of a result's chosen token."""
    return int(result[0]), float(result[1:2].view(np.float32)[0]), int(result[2])
