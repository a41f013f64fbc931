"""Speculation changes the number of steps and nothing else."""

import json

import pytest

from jpaged import LLM, EngineConfig, SamplingParams, StructuredOutputsParams
from jpaged.config import SpeculativeConfig
from jpaged.errors import InvalidConfigError
from jpaged.scheduling.ngrams import Ngrams, NgramSpeculator
from tests.engine.support import GOLDENS, run

LOOP = [7, 8, 9, 10, 11] * 5  # whoever goes on like this is guessed right, by a model of random weights hardly ever


def speculator():
    return NgramSpeculator(5, longest=3, shortest=1)


def requests():
    greedy = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    few = [30, 80]  # of two tokens that may come, a guess is often right
    yield LOOP, greedy
    yield LOOP[:-2], SamplingParams(seed=1, max_tokens=50, allowed_token_ids=few, ignore_eos=True, logprobs=2)
    yield LOOP[3:], SamplingParams(seed=2, n=3, max_tokens=40, allowed_token_ids=few, ignore_eos=True)
    yield LOOP, SamplingParams(seed=3, n=2, best_of=3, max_tokens=30, allowed_token_ids=few, ignore_eos=True)
    yield LOOP, SamplingParams(seed=4, max_tokens=50, allowed_token_ids=[*few, 5], frequency_penalty=0.5, ignore_eos=True)  # fmt: skip
    yield LOOP, SamplingParams(seed=5, max_tokens=50, allowed_token_ids=few, stop_token_ids=[30], min_tokens=9)
    yield LOOP[1:], SamplingParams(seed=6, max_tokens=60, logit_bias={30: 8.0, 80: 8.0}, prompt_logprobs=1)
    # These are never guessed about, and go on beside the others.
    yield LOOP, SamplingParams(n=2, use_beam_search=True, temperature=0, max_tokens=12, ignore_eos=True)
    yield LOOP, SamplingParams(temperature=0, max_tokens=30, stop="a")
    yield LOOP, SamplingParams(seed=7, max_tokens=30, structured_outputs=StructuredOutputsParams(regex="(ab){3,9}"))


def add_all(engine):
    for i, (tokens, params) in enumerate(requests()):
        engine.add_request(str(i), {"prompt_token_ids": tokens}, params)


def check_equal(got, expected):
    for name, output in expected.items():
        for mine, other in zip(got[name].outputs, output.outputs, strict=True):
            assert (mine.token_ids, mine.text, mine.finish_reason) == (other.token_ids, other.text, other.finish_reason)
            if other.cumulative_logprob is not None:
                assert mine.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-3)
            if other.logprobs is not None:
                assert [list(at) for at in mine.logprobs] == [list(at) for at in other.logprobs]


@pytest.fixture(scope="module")
def plain(tiny):
    outputs, steps = {}, 0
    for i, (tokens, params) in enumerate(requests()):
        engine = tiny(enable_prefix_caching=False)
        engine.add_request(str(i), {"prompt_token_ids": tokens}, params)
        outputs |= run(engine)
        steps += engine.times.steps
    return outputs, steps


def test_alone(tiny, plain):
    expected, plain_steps = plain
    outputs, steps, accepted = {}, 0, 0
    for i, (tokens, params) in enumerate(requests()):
        engine = tiny(enable_prefix_caching=False, speculator=speculator())
        engine.add_request(str(i), {"prompt_token_ids": tokens}, params)
        outputs |= run(engine)
        steps += engine.times.steps
        accepted += engine.scheduler.speculator.num_accepted
    check_equal(outputs, expected)
    assert accepted > 50
    assert steps < plain_steps - 30


@pytest.mark.parametrize("options", [{}, {"num_blocks": 60, "swap_blocks": 60}, {"enable_prefix_caching": False}], ids=str)  # fmt: skip
def test_together(tiny, plain, options):
    expected, _ = plain
    engine = tiny(speculator=speculator(), **options)
    add_all(engine)
    check_equal(run(engine), expected)
    assert engine.scheduler.speculator.num_accepted > 0
    assert "num_blocks" not in options or engine.scheduler.num_preemptions > 0


def test_a_session_keeps_what_was_computed(tiny):
    from tests.engine.support import llm_of

    params = SamplingParams(seed=1, max_tokens=30, allowed_token_ids=[30, 80], ignore_eos=True)
    drawn = []
    for options in ({}, {"speculator": speculator()}):
        session = llm_of(tiny(enable_prefix_caching=False, **options)).session({"prompt_token_ids": LOOP})
        first = session.sample(params)
        session.truncate(len(session.token_ids) - 3)
        drawn.append((first.token_ids, session.sample(params).token_ids))
        session.close()
    assert drawn[0] == drawn[1]


def test_smollm2_chats(smollm2):
    """Hugging Face's tokens, in fewer steps than tokens: answers repeat their questions."""
    engine = smollm2(speculator=NgramSpeculator(7, longest=4, shortest=2), enable_prefix_caching=False)
    chats = json.loads((GOLDENS / "smollm2_chats.json").read_text())[:4]
    steps = tokens = 0
    for i, chat in enumerate(chats):
        count = len(chat["output_token_ids"])
        engine.add_request(str(i), {"prompt_token_ids": chat["prompt_token_ids"]}, SamplingParams(temperature=0, max_tokens=count))  # fmt: skip
        before = engine.times.steps
        assert run(engine)[str(i)].outputs[0].token_ids == chat["output_token_ids"]
        steps += engine.times.steps - before
        tokens += count
    assert engine.scheduler.speculator.num_accepted > 0
    assert steps < tokens


def test_the_llm_takes_it(tmp_path):
    llm = LLM(
        model=str(GOLDENS / "models" / "llama"),
        max_num_seqs=1,
        max_model_len=128,
        block_size=4,
        warmup=False,
        speculative_config={"num_speculative_tokens": 3, "prompt_lookup_min": 1},
    )
    params = SamplingParams(temperature=0, max_tokens=40, allowed_token_ids=[9], ignore_eos=True)
    [output] = llm.generate({"prompt_token_ids": LOOP}, params)
    assert output.outputs[0].token_ids == [9] * 40
    assert llm.engine.times.steps < 20


def test_what_follows_the_longest_run_is_guessed():
    ngrams = Ngrams()
    tokens = [1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3]
    assert ngrams.continuation(tokens, range(1, 4), 3) == [4, 9, 2]  # 1 2 3 stood at the beginning
    assert ngrams.continuation([*tokens, 7], range(1, 4), 3) == []
    tokens = [4, 5, 4, 5]
    assert Ngrams().continuation(tokens, range(2, 3), 5) == [4, 5, 4, 5, 4]  # a loop goes on
    assert Ngrams().continuation(tokens, range(3, 5), 5) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{", "it takes, say"),
        (
            {"num_speculative_tokens": 0},
            "^speculative_config: num_speculative_tokens=0 must be an integer from 1 to 64",
        ),
        ({"num_speculative_tokens": 3, "method": "eagle"}, "'eagle' is not offered"),
        ({"num_speculative_tokens": 3, "prompt_lookup_min": 5}, "above"),
        ({"method": "ngram"}, "num_speculative_tokens"),
        ({"num_speculative_tokens": 3, "model": "x"}, "model"),
    ],
)
def test_bad_configurations(given, message):
    with pytest.raises(InvalidConfigError, match=message):
        EngineConfig(speculative_config=given)


def test_it_may_be_json():
    text = '{"method": "ngram", "num_speculative_tokens": 4}'
    assert EngineConfig(speculative_config=text).speculative_config == SpeculativeConfig(num_speculative_tokens=4)
