"""LLMEngine: add_request -> schedule -> launch -> read -> commit -> outputs.

step():   plan = scheduler.schedule()            host, while the device computes the step before
          runner.forward(plan), runner.sample    go onto the device's queue
          outputs = read and commit the step before
"""

import collections
import contextlib
import dataclasses
import operator
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import jax

from jpaged.config import EngineConfig
from jpaged.errors import EngineDeadError, InvalidConfigError, InvalidRequestError, SnapshotError
from jpaged.groups import GroupMaker
from jpaged.output_processor import OutputProcessor
from jpaged.outputs import RequestMetrics, RequestOutput
from jpaged.request_limits import RequestLimits
from jpaged.runtime.runner import StepResult
from jpaged.sampling_params import SamplingParams
from jpaged.scheduling import StepPlan
from jpaged.sequence import FinishReason, Holder, Readout, Sequence, SequenceGroup
from jpaged.snapshots import Snapshot, fingerprint, record_of
from jpaged.source import Params, fit, flatten, of_arguments
from jpaged.startup import Components, build
from jpaged.structured import Grammars, masks_of
from jpaged.tokenization import Prompt, encode_prompt

InFlight = Literal["recompute", "continue", "abort"]
"""What becomes of unfinished requests when the weights change."""


@dataclasses.dataclass
class StepTimes:
    """Where the engine's thread spent its time, in seconds, since the last reset."""

    steps: int = 0
    host: float = 0.0
    """Scheduling, packing, launching, committing, outputs."""
    wait: float = 0.0
    """Waiting for the device. What the host does meanwhile is hidden behind it."""

    def reset(self) -> None:
        self.steps, self.host, self.wait = 0, 0.0, 0.0


class LLMEngine:
    """A continuous-batching engine over one model. Not thread-safe: one thread adds, aborts and steps.

    Args:
      config: the engine's arguments; or give them as keywords, and live parameters with them: see `LLM`.
      components: what `jpaged.startup.build` makes of the config; None: it is called here.
    """

    def __init__(
        self, config: EngineConfig | None = None, *, components: Components | None = None, **arguments
    ) -> None:
        self.config, source = (config, None) if config is not None else of_arguments(**arguments)
        parts = components or build(self.config, source)
        self.model_config, self.tokenizer = parts.model_config, parts.tokenizer
        self.generation_config = parts.generation_config
        self.eos_token_ids = parts.eos_token_ids
        self.max_model_len = parts.max_model_len
        self.runner, self.scheduler, self.blocks = parts.runner, parts.scheduler, parts.blocks
        self.limits = RequestLimits(
            parts.model_config.vocab_size, parts.max_model_len, parts.eos_token_ids, parts.tokenizer
        )
        self._maker = GroupMaker(self.limits)
        self._outputs = OutputProcessor(self.tokenizer, self._stop)
        self._groups: dict[str, SequenceGroup] = {}
        self._next_arrival = 0
        self._in_flight: collections.deque[StepResult] = collections.deque()
        self._interrupted = False
        self._failure: BaseException | None = None
        self._fingerprint: tuple[int, str] | None = None
        self._aborted: list[SequenceGroup] = []
        self._ready: list[RequestOutput] = []  # for the next step to return
        self._to_linen = parts.to_linen
        self.times = StepTimes()
        self.on_commit: Callable[[StepPlan, list[Sequence]], None] = lambda plan, received: None
        """Called with each step's plan, and the sequences that got a token, when its results have been entered."""

    # ---------------------------------------------------------------------------------------------- requests

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        holder: Holder | None = None,
        readout: Readout | None = None,
    ) -> None:
        """Queues a request.

        Args:
          request_id: unique among the unfinished requests.
          prompt: text, chat or token ids; see `jpaged.tokenization`.
          params: how to sample; None: `SamplingParams()`.
          priority: smaller is served first; needs scheduling_policy="priority".
          holder: of a session: the request goes on with its blocks and leaves it the blocks that it has in the end.
          readout: what else is read off the prompt.

        Raises:
          InvalidRequestError: it can't be served as asked. Nothing else is affected.
          EngineDeadError: a step has failed before.
        """
        self._check_alive()
        if request_id in self._groups:
            raise InvalidRequestError(f"request id {request_id!r} is in use by an unfinished request.")
        if priority and self.config.scheduling_policy != "priority":
            raise InvalidRequestError('priority needs an engine with scheduling_policy="priority".')
        params = SamplingParams() if params is None else params
        text, tokens, salt = encode_prompt(prompt, self.tokenizer)
        self.limits.check_prompt(tokens)
        self.limits.check_params(params)
        if holder is not None and (params.num_sequences > 1 or params.use_beam_search):
            raise InvalidRequestError("a session is one sequence: fork it, instead of n, best_of or beams.")
        readout = readout or Readout()
        if readout.pooling not in (None, "last", "mean"):
            raise InvalidRequestError(f'pooling={readout.pooling!r} must be "last" or "mean".')
        if self.runner.capture is not None and params.use_beam_search:
            raise InvalidRequestError("activations can't be captured in beam search: use sampling, or n.")
        arrival = self._next_arrival
        group = self._maker.new(
            request_id,
            tokens,
            params,
            (self.config.seed << 32) + arrival,
            prompt=text,
            order=(priority, arrival),
            metrics=RequestMetrics(arrival_time=time.monotonic()),
            cache_salt=salt,
            bypasses_cache=self.runner.capture is not None or readout.pooling == "mean",
            readout=readout,
        )
        if holder is not None:
            group.sequences[0].holder = holder
        self.scheduler.add(group)
        self._groups[request_id] = group
        self._next_arrival += 1

    def abort(self, request_id: str | Iterable[str]) -> None:
        """Ends requests, whatever they are doing; the next step returns what they had. Unknown ids are ignored."""
        for one in [request_id] if isinstance(request_id, str) else list(request_id):
            group = self._groups.pop(one, None)
            if group is not None:
                self.scheduler.abort(group)
                self._aborted.append(group)

    abort_request = abort

    def abort_all(self) -> None:
        """Ends every request, as `abort` does."""
        self.abort(list(self._groups))

    def take_aborted(self) -> list[RequestOutput]:
        """What aborted requests had, without a step, after what was read before them."""
        (ready, self._ready), (aborted, self._aborted) = (self._ready, []), (self._aborted, [])
        return ready + [self._outputs.output(group) for group in aborted]

    @property
    def num_unfinished_requests(self) -> int:
        return len(self._groups)

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything left to do or to return."""
        return bool(self._groups or self._aborted or self._ready or self._in_flight)

    # --------------------------------------------------------------------------------------------- snapshots

    def snapshot(self, request_ids: Iterable[str] | None = None) -> Snapshot:
        """The unfinished requests as plain data, whatever they are doing; nothing is changed.

        Tokens that are still on the device are not in it: whoever goes on from it draws them again, and alike. A
        session's request goes on as one that nobody holds.

        Args:
          request_ids: only these, as far as they are unfinished; None: all.
        """
        groups = self._groups.values() if request_ids is None else map(self._groups.get, request_ids)
        return Snapshot(
            fingerprint=self.fingerprint,
            next_arrival=self._next_arrival,
            requests=[record_of(group, self._outputs.stopped_text) for group in groups if group is not None],
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Goes on with a snapshot's requests, in their places in the queue and beside those that are here already.

        What a request had generated is computed again as part of its prompt. With output_kind DELTA, the first output
        begins with the first token.

        Raises:
          SnapshotError: it belongs to another model, or this engine can't serve one of its requests as it was begun.
            Then none of them is restored.
        """
        self._check_alive()
        if snapshot.fingerprint != self.fingerprint:
            raise SnapshotError(
                "the snapshot belongs to another model, or to other weights: texts would go on in another voice. Serve "
                "the model that it was made with, or begin without it."
            )
        groups = [self._maker.again(record) for record in snapshot.requests]
        if used := self._groups.keys() & {group.request_id for group in groups}:
            raise SnapshotError(f"requests {sorted(used)} of the snapshot have names of unfinished requests.")
        for i, group in enumerate(groups):
            try:
                self.scheduler.add(group)
            except InvalidRequestError as error:
                for added in groups[:i]:
                    self.scheduler.abort(added)
                raise SnapshotError(
                    f"request {group.request_id!r} of the snapshot can't go on here: {error}"
                ) from error
        for group, record in zip(groups, snapshot.requests, strict=True):
            self._groups[group.request_id] = group
            self._outputs.restore(group, [sequence.stopped_text for sequence in record.sequences])
        self._next_arrival = max(self._next_arrival, snapshot.next_arrival)

    @property
    def fingerprint(self) -> str:
        """Of the model and of the weights that are served."""
        version = self.weights_version
        if self._fingerprint is None or self._fingerprint[0] != version:
            self._fingerprint = version, fingerprint(self.model_config, self.runner.params)
        return self._fingerprint[1]

    # ----------------------------------------------------------------------------------------------- weights

    @property
    def params(self) -> Params:
        """The parameters that are served: the arrays themselves."""
        return self.runner.params

    @property
    def weights_version(self) -> int:
        """How often the weights have been updated."""
        return self.blocks.weights_version

    def update_weights(self, params: Any, *, in_flight: InFlight = "recompute") -> int:
        """Serves other parameters from the next step on; see `LLM.update_weights`."""
        self._check_alive()
        if in_flight not in ("recompute", "continue", "abort"):
            raise InvalidConfigError(f"in_flight={in_flight!r} must be recompute, continue or abort.")
        current = self.runner.params
        new = fit(flatten(params, self._to_linen), current)
        if all(map(operator.is_, jax.tree.leaves(new), jax.tree.leaves(current))):
            return self.weights_version
        with self._dies_of_errors():
            while self._in_flight:  # what was launched belongs to the old weights
                self._ready += self._commit()
        self.runner.params = new
        if in_flight == "abort":
            self.abort_all()
        elif in_flight == "recompute":
            self.scheduler.preemption.preempt_all(swapped_too=True)
            for group in self._groups.values():
                if group.wants_prompt_logprobs:
                    group.prompt_logprobs = None
        self.blocks.new_weights()
        return self.weights_version

    # -------------------------------------------------------------------------------------------------- step

    def step(self) -> list[RequestOutput]:
        """Launches the next step and returns what the one before it brought.

        Raises:
          EngineDeadError: the device failed; every unfinished request is lost.
        """
        self._check_alive()
        start, waited = time.perf_counter(), self.times.wait
        outputs, self._ready = self._ready, []
        with self._dies_of_errors():
            outputs += self._step()
        outputs += self.take_aborted()
        self.times.host += time.perf_counter() - start - (self.times.wait - waited)
        return outputs

    @contextlib.contextmanager
    def _dies_of_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failure = error
            raise EngineDeadError(
                f"a step failed and the engine can't go on: {type(error).__name__}: {error}"
            ) from error

    def _step(self) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        # After an interrupt (Ctrl-C) in waiting, two steps are in flight; after one in launching, see `_launch`.
        wait_for_all = self._interrupted or self.scheduler.needs_results
        while len(self._in_flight) > (0 if wait_for_all else 1):
            outputs += self._commit()
        self._interrupted = False
        plan = self.scheduler.schedule()
        if plan is not None:
            outputs += self._launch(self.runner.widened(plan))
        if len(self._in_flight) > 1 or (self._in_flight and plan is None):
            outputs += self._commit()
        return outputs

    def _launch(self, plan: StepPlan) -> list[RequestOutput]:
        """Uploads what the plan admits and puts the step on the device's queue."""
        outputs, masks = [], None
        try:
            self.runner.prepare(plan)
            for sequence in plan.admitted:
                self.runner.admit(
                    sequence, self.blocks.tables[sequence.row], self.limits.bad_words(sequence.group.params)
                )
            forward = self.runner.forward(plan)
            if plan.variant.structured:
                # Grammars must know the tokens of the step before. They are advanced while the device is at this one.
                while self._in_flight:
                    outputs += self._commit()
                masks, failed = masks_of(plan, self.model_config.vocab_size)
                outputs += self._fail(failed)
            self._in_flight.append(self.runner.sample(plan, forward, masks))
        except BaseException:
            # Planned and never computed: whoever counted on these keys and values must compute them anew.
            self._interrupted = True
            self.scheduler.preemption.preempt_all()
            self.blocks.reset_prefix_cache()
            raise
        return outputs

    def _fail(self, failed: list[tuple[Sequence, str]]) -> list[RequestOutput]:
        """Ends sequences that can't go on; returns the outputs of the groups that this finishes."""
        for sequence, reason in failed:
            self.scheduler.finish(sequence, FinishReason.ERROR, f"structured_outputs: {reason}")
        groups = dict.fromkeys(sequence.group for sequence, _ in failed)
        return self._finished([self._outputs.output(group) for group in groups if group.finished])

    def _commit(self) -> list[RequestOutput]:
        """Waits for the oldest step in flight and enters its tokens."""
        result = self._in_flight[0]
        start = time.perf_counter()
        results = result.read()
        self.times.wait += time.perf_counter() - start
        self.times.steps += 1
        self._in_flight.popleft()
        received = self.scheduler.commit(result.plan, results.tokens, results.candidates)
        outputs = self._outputs.process(result.plan, received, results.tokens, results.prompt_scores, results.pooled)
        self.on_commit(result.plan, received)
        return self._finished(outputs)

    def _finished(self, outputs: list[RequestOutput]) -> list[RequestOutput]:
        """Forgets the groups of the outputs that are a request's last."""
        for output in outputs:
            if output.finished:
                self._groups.pop(output.request_id, None)
        return outputs

    def _stop(self, sequence: Sequence, stop: str) -> None:
        if sequence.finished:  # by a length limit or stop token that came with it: the text decides
            sequence.finish_reason, sequence.stop_reason = FinishReason.STOP, stop
        else:
            self.scheduler.finish(sequence, FinishReason.STOP, stop)

    # ------------------------------------------------------------------------------------------------ checks

    @property
    def grammars(self) -> Grammars:
        """Compiled grammars. Thread-safe: `add_request` does not wait for one that was compiled here before.

        Raises:
          InvalidRequestError: this engine can't have structured outputs.
        """
        return self._maker.grammars

    def end_compiling(self) -> None:
        """Gives up the grammars that are being compiled; any thread may call it."""
        self._maker.end_compiling()

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineDeadError(f"the engine stopped at an earlier error: {self._failure}") from self._failure
