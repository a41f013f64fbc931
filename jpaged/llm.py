"""LLM: the offline API. Prompts in, finished outputs back in their order."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jpaged.engine import LLMEngine
from jpaged.errors import InvalidRequestError
from jpaged.outputs import CompletionOutput, LogprobsAt, RequestOutput
from jpaged.progress import Progress
from jpaged.sampling_params import MAX_LOGPROBS, BeamSearchParams, RequestOutputKind, SamplingParams
from jpaged.sequence import Holder
from jpaged.session import Session
from jpaged.tokenization import Chat, Prompt, encode_prompt, is_chat, render_chat

if TYPE_CHECKING:
    from jpaged.tokenization import Tokenizer

import dataclasses


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
    ) -> list[RequestOutput]:
        """Continues prompts.

        Args:
          prompts: one prompt or several; each a string, a chat, {"prompt": ...} or {"prompt_token_ids": [...]}.
          sampling_params: one for all, or one for each prompt.
          use_tqdm: whether to show progress (on a terminal).
          priority: one for each prompt, with scheduling_policy="priority".

        Returns: one finished output for each prompt, in order.

        Raises:
          InvalidRequestError: a prompt or its parameters can't be served. None of the call's prompts is run.
        """
        return self._generate(_as_list(prompts), sampling_params, use_tqdm=use_tqdm, priority=priority)

    def _generate(
        self,
        many: list[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        use_tqdm: bool = False,
        priority: Sequence[int] | None = None,
        holders: Sequence[Holder] | None = None,
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

    # ------------------------------------------------------------------------------------------------ sessions

    def session(self, prompt: Prompt) -> Session:
        """A sequence in the caller's hands; see `jpaged.session`.

        Raises:
          InvalidRequestError: the prompt can't be served.
        """
        _, tokens, salt = encode_prompt(prompt, self.engine.tokenizer)
        self.engine.check_prompt(tokens)
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
