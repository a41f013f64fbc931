"""What goes along with a beam of a beam search besides its tokens: its text and its place in a grammar."""

import dataclasses
from typing import TYPE_CHECKING

from jpaged.sequence import SequenceGroup
from jpaged.structured import Matcher
from jpaged.tokenization import Detokenizer, find_stop

if TYPE_CHECKING:
    from jpaged.tokenization import Tokenizer


@dataclasses.dataclass(frozen=True, slots=True)
class Companion:
    """See `jpaged.scheduling.beam_search.Companion`."""

    detokenizer: Detokenizer | None
    """Only as much of its text is kept as a stop string may begin in. None: no stop strings were asked for."""
    stops: tuple[str, ...]
    matcher: Matcher | None
    stop: str | None = None

    def follow(self, token: int) -> "Companion":
        detokenizer, stop = self.detokenizer, None
        if detokenizer is not None:
            detokenizer = detokenizer.fork()
            new = len(detokenizer.push([token]))
            found = find_stop(detokenizer.text, new, self.stops) if new else None
            stop = None if found is None else found[1]
            detokenizer.text = detokenizer.text[-max(map(len, self.stops)) :]
        matcher = None if self.matcher is None else self.matcher.follow(token)
        return Companion(detokenizer, self.stops, matcher, stop)


def companion_of(group: SequenceGroup, matcher: Matcher | None, tokenizer: "Tokenizer | None") -> Companion | None:
    """That of a group's bare prompt; None if its beams need none."""
    params, detokenizer = group.params, None
    stops: tuple[str, ...] = params.stop  # type: ignore[assignment]  # normalised to a tuple
    if stops and tokenizer is not None:
        detokenizer = Detokenizer(tokenizer, group.prompt_token_ids, params.skip_special_tokens)
    return None if matcher is None and detokenizer is None else Companion(detokenizer, stops, matcher)
