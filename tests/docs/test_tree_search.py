"""The tree search of docs/examples: its branches share what they have in common, and its sums are the model's."""

import random

import pytest

from docs.examples.tree_search import Search, close
from jpaged.sampling_params import SamplingParams
from tests.engine.support import llm_of

PROMPT = {"prompt_token_ids": random.Random(2).sample(range(300), 21)}


def four_tokens(tokens):
    """Reached by four tokens with an even sum."""
    return None if len(tokens) < 4 else sum(tokens) % 2 == 0


def blocks_of_the_tree(sessions, block_size):
    """Every computed token once: a block is known by all the tokens up to its last one."""
    return {
        tuple(s.token_ids[: min(end + block_size, s.num_computed_tokens)])
        for s in sessions
        for end in range(0, s.num_computed_tokens, block_size)
    }


def test_branches_share_every_block_that_they_have_in_common(tiny):
    llm = llm_of(tiny(enable_prefix_caching=False))
    root = llm.session(PROMPT)
    search = Search(llm, root, four_tokens, wanted=2, branching=3)
    for _ in range(6):
        search.step(width=4)
        live = [branch.session for branch in [*search.frontier, *search.found]]
        assert llm.engine.blocks.num_used == len(blocks_of_the_tree(live, 4))
        llm.engine.blocks.check_invariants()
    assert search.found
    assert search.peak[1] < search.peak[0] / 2
    assert search.computed == 21 + search.expanded - 1, "the prompt once, and one token for every other expansion"
    close([*search.frontier, *search.found])
    assert llm.engine.blocks.num_used == 0


def fresh_score(llm, tokens, start):
    """The log-probability of the tokens from `start` on, by a request that shares nothing with anybody."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    [output] = llm.generate({"prompt_token_ids": tokens, "cache_salt": "alone"}, params, use_tqdm=False)
    return sum(at[token].logprob for token, at in zip(tokens[start:], output.prompt_logprobs[start:], strict=True))


def test_the_best_of_all_paths_are_found_and_fresh_requests_score_the_same(tiny):
    llm = llm_of(tiny())
    with llm.session(PROMPT) as root:
        found = Search(llm, root, four_tokens, wanted=3, branching=3, hope=0.5).run(width=5)
        every = [([], 0.0)]
        for _ in range(4):
            ends = [llm.session({"prompt_token_ids": root.token_ids + tokens}) for tokens, _ in every]
            every = [
                ([*tokens, token], total + option.logprob)
                for (tokens, total), options in zip(every, llm.next_logprobs(ends, 3), strict=True)
                for token, option in options.items()
            ]
            for end in ends:
                end.close()
        every = sorted((way for way in every if four_tokens(way[0])), key=lambda way: -way[1])
        assert [b.session.token_ids for b in found] == [root.token_ids + tokens for tokens, _ in every[:3]]
        scores = [fresh_score(llm, branch.session.token_ids, len(root)) for branch in found]
        assert [branch.logprob for branch in found] == pytest.approx(scores, abs=1e-4)
        for branch in found:
            branch.session.close()
    assert llm.engine.blocks.num_used == 0
