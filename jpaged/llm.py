"""LLM: the offline API. Prompts in, finished outputs back in their order."""

import dataclasses
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jpaged.engine import InFlight, LLMEngine
from jpaged.errors import InvalidRequestError
from jpaged.outputs import CompletionOutput, LogprobsAt, RequestOutput
from jpaged.progress import Progress
from jpaged.readout import EMBEDDING, SCORING, embedding_of, logprobs_from, pooled, scored, with_completion
from jpaged.sampling_params import MAX_LOGPROBS, BeamSearchParams, RequestOutputKind, SamplingParams
from jpaged.sequence import Holder, Pooling, Readout
from jpaged.session import Session
from jpaged.source import Params
from jpaged.tokenization import Chat, Prompt, encode_prompt, is_chat, render_chat

if TYPE_CHECKING:
    from jpaged.tokenization import Tokenizer


class LLM:
    """A model that generates text.

        llm = LLM(model="smollm2-135m")
        llm.generate(["Once upon a time"], SamplingParams(temperature=0.8, max_tokens=32))
        llm.chat([{"role": "user", "content": "What is JAX?"}])

        llm = LLM(model=config, params=tree, tokenizer=tokenizer)  # parameters that are being trained, say

    Args:
      model: a short name (smollm2-135m), a .gguf file, a folder, or a hub id; or, for parameters in memory, a
        `ModelConfig`, a module of `jpaged.models`, or a checkpoint (`checkpoints.load`).
      params: with a configuration or a module: the parameters, a Linen tree or an NNX state. They are not copied if
        they have the dtype that is served and lie on the device; see `jpaged.source.live` and docs/live_parameters.md.
      **arguments: the other fields of `EngineConfig`; with `params`, `tokenizer` is a tokenizer, and `to_linen` may
        say how a tree of other keys becomes ours.

    Raises:
      TypeError: an argument that jpaged does not have.
      InvalidConfigError, OutOfMemoryError, checkpoints.CheckpointError: see `jpaged.startup.build`.
      MissingWeightsError: leaves of `params` are missing, surplus or misshapen; all of them are listed.
    """

    def __init__(self, model: Any = "smollm2-135m", *, params: Any = None, **arguments) -> None:
        self.engine = LLMEngine(model=model, params=params, **arguments)
        self._pinned: weakref.WeakSet[Session] = weakref.WeakSet()
        self._next_id = 0

    def get_tokenizer(self) -> "Tokenizer | None":
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        params: Any = None,
    ) -> list[RequestOutput]:
        """Continues prompts.

        Args:
          prompts: one prompt or several; each a string, a chat, {"prompt": ...} or {"prompt_token_ids": [...]}.
          sampling_params: one for all, or one for each prompt.
          use_tqdm: whether to show progress (on a terminal).
          priority: one for each prompt, with scheduling_policy="priority".
          params: parameters to serve from now on, as by `update_weights`; None: those that are served.

        Returns: one finished output for each prompt, in order.

        Raises:
          InvalidRequestError: a prompt or its parameters can't be served. None of the call's prompts is run.
        """
        if params is not None:
            self.update_weights(params)
        return self._generate(_as_list(prompts), sampling_params, use_tqdm=use_tqdm, priority=priority)

    def _generate(
        self,
        many: list[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        use_tqdm: bool = False,
        priority: Sequence[int] | None = None,
        holders: Sequence[Holder] | None = None,
        readouts: Sequence[Readout] | None = None,
    ) -> list[RequestOutput]:
        if not isinstance(sampling_params, Sequence):
            sampling_params = [sampling_params or SamplingParams()] * len(many)
        if len(sampling_params) != len(many) or (priority is not None and len(priority) != len(many)):
            raise InvalidRequestError(
                f"{len(many)} prompts need as many sampling_params and priorities, or one for all."
            )
        ids: list[str] = []
        try:
            for i, (prompt, params) in enumerate(zip(many, sampling_params, strict=True)):
                request_id = f"llm-{self._next_id}"
                self._next_id += 1
                params = dataclasses.replace(params, output_kind=RequestOutputKind.FINAL_ONLY)
                self.engine.add_request(
                    request_id,
                    prompt,
                    params,
                    priority=priority[i] if priority else 0,
                    holder=holders[i] if holders else None,
                    readout=readouts[i] if readouts else None,
                )
                ids.append(request_id)
            return self._run(ids, use_tqdm)
        except BaseException:  # an error or Ctrl-C: nothing of this call stays behind
            self.engine.abort(ids)
            raise

    def chat(
        self,
        messages: Chat | Sequence[Chat],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[RequestOutput]:
        """Answers chats through the model's own template; see `generate`.

        Args:
          messages: one chat or several; a chat is a list of {"role": ..., "content": ...}.
          add_generation_prompt: begin an answer of the assistant.
          continue_final_message: continue the last message instead.
        """
        chats: list[Chat] = [messages] if is_chat(messages) else list(messages)  # type: ignore[list-item, arg-type]
        tokenizer = self.engine.tokenizer
        prompts: list[Prompt] = []
        for chat in chats:
            text = render_chat(
                chat,
                tokenizer,
                continue_final_message=continue_final_message,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
            )
            tokens = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids  # type: ignore[union-attr]
            prompts.append({"prompt": text, "prompt_token_ids": tokens})
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, *, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        """Searches for the most likely outputs of each prompt: `beam_width` of them, best first, with their scores."""
        return self.generate(prompts, params.as_sampling_params(), use_tqdm=use_tqdm)

    def score(
        self, prompts: Prompt | Sequence[Prompt], completions: Sequence[str | Sequence[int]], *, use_tqdm: bool = True
    ) -> list[list[float]]:
        """Log-probabilities of given completions: of each token, given the prompt and the tokens before it.

        Completions of one prompt compute it once, by the prefix cache.

        Args:
          prompts: one for all completions, or one for each.
          completions: text, tokenised apart from its prompt and without special tokens, or token ids; not empty. Prompt
            and completion together have fewer than max_model_len tokens.

        Returns: natural logarithms, one list for each completion, one number for each of its tokens.

        Raises:
          InvalidRequestError: a prompt or a completion can't be served. None of the call's is run.
        """
        many = _as_list(prompts)
        many = many * len(completions) if len(many) == 1 else many
        if len(many) != len(completions):
            raise InvalidRequestError(f"{len(many)} prompts need as many completions, not {len(completions)}.")
        pairs = [with_completion(self.engine, p, c) for p, c in zip(many, completions, strict=True)]
        starts = [start for _, start in pairs]
        readouts = [scored(start) for start in starts]
        outputs = self._generate([whole for whole, _ in pairs], SCORING, use_tqdm=use_tqdm, readouts=readouts)
        return [logprobs_from(output, start) for output, start in zip(outputs, starts, strict=True)]

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: Pooling = "last",
        normalize: bool = True,
        use_tqdm: bool = True,
    ) -> np.ndarray:
        """Embeddings: each prompt's final hidden states (after the last norm, before the logits), pooled to one.

        Args:
          prompts: as in `generate`; each has fewer than max_model_len tokens.
          pooling: "last": the last token's. "mean": the mean over all tokens; then the prefix cache is not looked at.
          normalize: divide each by its Euclidean norm.

        Returns: float32 [prompts, E].

        Raises:
          InvalidRequestError: a prompt can't be served, or there is no such pooling. None of the call's prompts is run.
        """
        many = _as_list(prompts)
        outputs = self._generate(many, EMBEDDING, use_tqdm=use_tqdm, readouts=[pooled(pooling)] * len(many))
        empty = np.zeros((0, self.engine.model_config.hidden_size), np.float32)
        return np.stack([embedding_of(output, normalize) for output in outputs]) if outputs else empty

    # ------------------------------------------------------------------------------------------------- weights

    @property
    def params(self) -> Params:
        """The parameters that are served, as a Linen tree: the arrays themselves, not copies."""
        return self.engine.params

    def update_weights(self, params: Any, *, in_flight: InFlight = "recompute") -> int:
        """Serves other parameters of the same model from the next step on. Nothing is traced or compiled for it.

        Leaves that have the served dtype and place are taken as they are, without a copy; others are cast or moved.
        All cached keys and values belong to the old parameters and are never used again: the prefix cache is empty
        then, sessions compute their tokens anew when they go on, and pinned ones do so at once.

        Args:
          params: a tree as `LLM` takes it, with the served shapes. If its arrays are those that are served already,
            nothing happens. Do not donate them to a jitted function (`donate_argnums`) while they are served.
          in_flight: what becomes of unfinished requests. Tokens that they have stay in any case.
            recompute: all keys and values are computed again; what follows is the new parameters' alone.
            continue: they go on with their old keys and values (as in PipelineRL, arXiv 2509.19128).
            abort: they end with what they have.

        Returns: how often the weights have been updated: the `weights_version` of outputs that end from now on.

        Raises:
          MissingWeightsError: leaves are missing, surplus or misshapen; all are listed. Nothing has changed.
          InvalidConfigError: `params` is no tree of floating-point arrays. Nothing has changed.
        """
        pinned = [session for session in self._pinned if session.pinned]
        version = self.engine.update_weights(params, in_flight=in_flight)
        for session in pinned:
            session.pin()
        return version

    # ------------------------------------------------------------------------------------------------ sessions

    def session(self, prompt: Prompt) -> Session:
        """A sequence in the caller's hands; see `jpaged.session`.

        Raises:
          InvalidRequestError: the prompt can't be served.
        """
        _, tokens, salt = encode_prompt(prompt, self.engine.tokenizer)
        self.engine.limits.check_prompt(tokens)
        return Session(self, list(tokens), salt)

    def sample(
        self, sessions: Sequence[Session], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[CompletionOutput]:
        """Generates for several sessions at once, and lets each keep what was generated for it.

        Args:
          params: one for all, or one for each; with n=1 and no beams.
        """
        completions = [output.outputs[0] for output in self._run_sessions(sessions, params)]
        for session, completion in zip(sessions, completions, strict=True):
            session.token_ids = session.token_ids + completion.token_ids
        return completions

    def next_logprobs(self, sessions: Sequence[Session], count: int = MAX_LOGPROBS) -> list[LogprobsAt]:
        """Of each session, the `count` (0 to 20) most likely next tokens with their log-probabilities."""
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=count, ignore_eos=True, detokenize=False)
        outputs = self._run_sessions(sessions, params)
        return [output.outputs[0].logprobs[0] for output in outputs]  # type: ignore[index]  # asked for

    def _run_sessions(
        self, sessions: Sequence[Session], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[RequestOutput]:
        holders = [session.open_holder for session in sessions]
        if len(set(map(id, holders))) < len(holders):
            raise InvalidRequestError("a session is given twice: fork it to go on from it in two ways.")
        prompts: list[Prompt] = [{"prompt_token_ids": s.token_ids, "cache_salt": s.cache_salt} for s in sessions]
        return self._generate(prompts, params, holders=holders)

    def remember_pin(self, session: Session) -> None:
        """A session has been pinned: it will be again when the weights change."""
        self._pinned.add(session)

    def reset_prefix_cache(self) -> None:
        """Forgets the blocks kept from earlier requests."""
        self.engine.blocks.reset_prefix_cache()

    def _run(self, ids: list[str], use_tqdm: bool) -> list[RequestOutput]:
        wanted, tokens = set(ids), 0
        finished: dict[str, RequestOutput] = {}
        with Progress("generating", total=len(ids), disable=None if use_tqdm else True) as progress:
            while len(finished) < len(ids):
                for output in self.engine.step():
                    if output.finished and output.request_id in wanted:
                        finished[output.request_id] = output
                        tokens += sum(len(o.token_ids) for o in output.outputs)
                        progress.note(f"{tokens} tokens")
                        progress.advance()
        return [finished[i] for i in ids]


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | dict) or is_chat(prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
