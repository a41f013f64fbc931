"""Session: a sequence in the caller's hands, to extend, fork, cut and sample from. A tree of them shares its blocks.

    root = llm.session("Once upon a time")
    for branch in root.fork(8):
        branch.append(" there was")
        branch.sample(SamplingParams(max_tokens=16))

Between its runs a session keeps its block table, parked: forks share all blocks until one writes. Parked tables give
way when requests need their blocks, the longest unused first; what was lost is computed again when it is needed.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jpaged.errors import InvalidRequestError, UnsupportedFeatureError
from jpaged.outputs import CompletionOutput, LogprobsAt
from jpaged.sampling_params import MAX_LOGPROBS, SamplingParams
from jpaged.sequence import Holder

if TYPE_CHECKING:
    from jpaged.llm import LLM


class Session:
    """Made by `LLM.session`. Not thread-safe, like its LLM.

    Attributes:
      token_ids: the prompt and all that was appended or sampled. Read it; change it by the methods.
    """

    def __init__(self, llm: "LLM", token_ids: list[int], cache_salt: str = "", holder: Holder | None = None) -> None:
        self.token_ids = token_ids
        self.holder: Holder | None = holder or Holder()
        self.cache_salt = cache_salt
        self._llm = llm

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def text(self) -> str:
        """The tokens as text, special tokens included."""
        return self._tokenizer.decode(self.token_ids, skip_special_tokens=False)

    @property
    def num_computed_tokens(self) -> int:
        """Tokens whose keys and values are in the pool now."""
        table = self.open_holder.table
        return 0 if table is None else table.num_computed

    def fork(self, n: int = 1) -> list["Session"]:
        """n more sessions with the same tokens, over the same blocks."""
        table, blocks = self.open_holder.table, self._llm.engine.blocks
        holders = [Holder(None if table is None else blocks.parked.fork(table)) for _ in range(n)]
        return [Session(self._llm, self.token_ids, self.cache_salt, holder) for holder in holders]

    def append(self, tokens: str | Sequence[int]) -> None:
        """Adds text or token ids at the end.

        Raises:
          InvalidRequestError: token ids outside the vocabulary, or more than max_model_len allows.
        """
        self.open_holder  # noqa: B018  # raises if closed
        if isinstance(tokens, str):
            tokens = self._tokenizer.backend_tokenizer.encode(tokens, add_special_tokens=False).ids
        extended = [*self.token_ids, *tokens]
        self._llm.engine.limits.check_prompt(extended)
        self.token_ids = extended

    def truncate(self, length: int) -> None:
        """Keeps the first `length` tokens; at least one."""
        if not 1 <= length <= len(self):
            raise InvalidRequestError(
                f"a session of {len(self)} tokens can't be cut to {length}: keep 1 to {len(self)}."
            )
        table = self.open_holder.table
        if table is not None:
            self._llm.engine.blocks.parked.truncate(table, length)
        self.token_ids = self.token_ids[:length]  # a new list: forks share the old one

    def sample(self, params: SamplingParams | None = None) -> CompletionOutput:
        """Generates, and keeps what was generated; for several sessions at once see `LLM.sample`."""
        return self._llm.sample([self], params)[0]

    def logprobs(self, count: int = MAX_LOGPROBS) -> LogprobsAt:
        """The most likely next tokens; for several sessions at once see `LLM.next_logprobs`."""
        return self._llm.next_logprobs([self], count)[0]

    def pin(self) -> None:
        """Computes what is not computed yet and keeps the full blocks in the pool until `unpin` or `close`.

        A shared prefix that is registered beforehand (paper, section 4.4): requests that begin with these tokens, and
        the same cache_salt, find it in the prefix cache, whatever else has come and gone. Going on from this session
        itself lifts the pin: fork it.

        Raises:
          UnsupportedFeatureError: the engine has no prefix cache, so that no request could find it.
          InvalidRequestError: with so much pinned, a request that is waiting or running might never fit.
        """
        if self._llm.engine.blocks.cache is None:
            raise UnsupportedFeatureError(
                "a pinned prefix is found by the prefix cache; use enable_prefix_caching=True."
            )
        if self.num_computed_tokens < len(self):
            self.logprobs(0)
        table = self.open_holder.table
        if table is not None:
            self._llm.engine.scheduler.pin(table)
            self._llm.remember_pin(self)

    def unpin(self) -> None:
        """Lets the blocks go when others need them."""
        table = self.open_holder.table
        if table is not None:
            table.pinned = False

    @property
    def pinned(self) -> bool:
        """Whether its full blocks are kept in the pool."""
        table = None if self.holder is None else self.holder.table
        return table is not None and table.pinned

    def close(self) -> None:
        """Gives the blocks back. A closed session can't be used."""
        if self.holder is not None and self.holder.table is not None:
            self._llm.engine.blocks.parked.release(self.holder.table)
        self.holder = None

    @property
    def open_holder(self) -> Holder:
        """What keeps its blocks.

        Raises:
          InvalidRequestError: the session is closed.
        """
        if self.holder is None:
            raise InvalidRequestError("this session is closed; make a new one with LLM.session.")
        return self.holder

    @property
    def _tokenizer(self):
        tokenizer = self._llm.engine.tokenizer
        if tokenizer is None:
            raise InvalidRequestError("text needs a tokenizer, and this engine has none: use token ids.")
        return tokenizer
