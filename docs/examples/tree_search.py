"""Best-first tree search with sessions: the likeliest sentences that go on from a text and have a given word in them.

    uv run --group demo python docs/examples/tree_search.py

Every branch is a session. The most promising ones are expanded together: one batch for their next tokens, one fork for
each token that may lead to something better. Log-probabilities only fall: a branch no better than the last sentence
wanted is dead, and closed. When none is left, nothing better is made of the 20 likeliest tokens at each place.
"""

import dataclasses
import heapq
import re
from collections.abc import Callable, Iterator

from jpaged import LLM, SamplingParams, Session

WORD = "sea"
PROMPT = """A story for small children, told in short and simple sentences.

Once upon a time there was a little boat with a white sail. It lived in a quiet harbour and dreamed of islands far \
away. One bright morning the wind came up. The little boat"""


@dataclasses.dataclass(order=True)
class Branch:
    cost: float  # the smallest is expanded first
    logprob: float  # summed over the tokens after the prompt
    session: Session = dataclasses.field(compare=False)


def close(branches: list[Branch]) -> None:
    for branch in branches:
        branch.session.close()


class Search:
    """A* over the continuations of a session, which stays the caller's.

    Args:
      goal: of the tokens after the prompt: reached (True), out of reach (False), or neither yet (None).
      hope: a guess of what is still to come: log-probability that a branch is forgiven for each of its tokens. With 0
        goals are found in their order, and late; with more, the first ones are found soon and cut off the rest.
    """

    def __init__(self, llm: LLM, root: Session, goal: Callable, *, wanted=5, branching=20, hope=1.0) -> None:
        self.llm, self.goal, self.wanted, self.branching, self.hope = llm, goal, wanted, branching, hope
        self.start, self.found = len(root), list[Branch]()  # the best first
        self.frontier = [Branch(0.0, 0.0, *root.fork())]  # a heap
        self.bar = float("-inf")  # what a branch must be better than
        self.peak = 0, 0  # entries of all block tables, blocks in use
        self.branches = self.expanded = self.computed = self.unshared = 0

    def run(self, *, budget: int = 2000, width: int = 16) -> list[Branch]:
        while self.frontier and self.expanded < budget:
            self.step(width)
        close(self.frontier)
        return self.found

    def step(self, width: int) -> None:
        """Expands the most promising branches together, and closes them and all that are dead."""
        batch = [heapq.heappop(self.frontier) for _ in range(min(width, len(self.frontier)))]
        sessions, blocks = [branch.session for branch in batch], self.llm.engine.blocks
        self.expanded += len(batch)
        self.unshared += sum(map(len, sessions))
        self.computed += sum(max(1, len(s) - s.num_computed_tokens) for s in sessions)
        for branch, options in zip(batch, self.llm.next_logprobs(sessions, self.branching), strict=True):
            for token, option in options.items():
                self.grow(branch, token, branch.logprob + option.logprob)
        tables = [branch.session.num_computed_tokens for branch in batch + self.frontier + self.found]
        self.peak = max(self.peak, (sum(map(blocks.blocks_for, tables)), blocks.num_used))
        close(batch + [branch for branch in self.frontier if branch.logprob <= self.bar])
        self.frontier = sorted(branch for branch in self.frontier if branch.logprob > self.bar)

    def grow(self, parent: Branch, token: int, logprob: float) -> None:
        tokens = [*parent.session.token_ids[self.start :], token]
        if logprob <= self.bar or (reached := self.goal(tokens)) is False:
            return
        [session] = parent.session.fork()
        session.append([token])
        branch = Branch(-logprob - self.hope * len(tokens), logprob, session)
        self.branches += 1
        if not reached:
            return heapq.heappush(self.frontier, branch)
        self.found = sorted([*self.found, branch], key=lambda found: -found.logprob)
        if len(self.found) > self.wanted:
            self.found.pop().session.close()
        self.bar = self.found[-1].logprob if len(self.found) == self.wanted else self.bar


def draw(ways: list[tuple[list[int], float]], decode: Callable, indent: str = "") -> Iterator[str]:
    """The tree of some (tokens, log-probability), a line for each stretch without a fork."""
    shortest = min(len(tokens) for tokens, _ in ways)
    common = next((i for i in range(shortest) if len({tokens[i] for tokens, _ in ways}) > 1), shortest)
    yield f"{f'{ways[0][1]:.2f}' if len(ways) == 1 else '':>8}  {indent}{decode(ways[0][0][:common]).strip() or '*'}"
    for first in dict.fromkeys(tokens[common] for tokens, _ in ways if len(tokens) > common):
        yield from draw([(t[common:], p) for t, p in ways if t[common] == first], decode, indent + "    ")


def main() -> None:
    llm = LLM(model="smollm2-135m", max_num_seqs=16, max_model_len=512, warmup=False)
    decode, root = llm.get_tokenizer().decode, llm.session(PROMPT)
    greedy = root.fork()[0].sample(SamplingParams(temperature=0, max_tokens=64, stop=["."], logprobs=0))

    def sentence(tokens: list[int]) -> bool | None:
        text = decode(tokens)
        return bool(re.search(rf"\b{WORD}\b", text)) if text.endswith(".") else None

    search = Search(llm, root, sentence)
    ways = [(branch.session.token_ids[len(root) :], branch.logprob) for branch in search.run()]
    print(PROMPT, "...\n", *draw(ways, decode), "", sep="\n")
    print(f"{greedy.cumulative_logprob:8.2f}  {decode(greedy.token_ids).strip()}   (greedy)\n")
    print(f"branches       {search.branches:>7,}   {search.expanded:,} expanded, {len(search.frontier):,} left open")
    print(f"blocks in use  {search.peak[1]:>7,}   at most; {search.peak[0]:,} without sharing")
    print(f"copies         {llm.engine.blocks.num_copies:>7,}   on write")
    print(f"tokens         {search.computed:>7,}   computed; {search.unshared:,} without sharing")


if __name__ == "__main__":
    main()
