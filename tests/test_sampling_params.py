"""SamplingParams: what is out of bounds is refused where it comes in, by the field's name."""

import dataclasses
import fractions
import math

import numpy as np
import pytest

from jpaged.errors import InvalidRequestError, JpagedError
from jpaged.sampling_params import RequestOutputKind, SamplingParams
from jpaged.structured import StructuredOutputsParams

NAN, INF = math.nan, math.inf
NO_NUMBERS = ["1", None, [1], b"1", 1j, np.array(1.0), object()]

REALS = {  # field: (accepted, refused)
    "presence_penalty": ([-2, 0, 2, 0.5], [-2.001, 2.001]),
    "frequency_penalty": ([-2, 0, 2, 0.5], [-2.001, 2.001]),
    "repetition_penalty": ([0.01, 1, 2], [0, -1, 2.001]),
    "temperature": ([0, 1, 2, 0.7], [-0.001, 2.001]),
    "top_p": ([0.001, 1], [0, -0.1, 1.001]),
    "min_p": ([0, 0.5, 1], [-0.001, 1.001]),
    "length_penalty": ([1], [-5.001, 5.001]),
}
INTEGERS = {
    "n": ([1, 64], [0, -1, 65]),
    "top_k": ([-1, 0, 1, 1 << 30], [-2, (1 << 30) + 1]),
    "max_tokens": ([16, 1 << 24, None], [0, -1, (1 << 24) + 1]),
    "min_tokens": ([0, 16], [-1, (1 << 24) + 1]),
    "logprobs": ([0, 20, None], [-1, 21]),
    "prompt_logprobs": ([0, 20, None], [-1, 21]),
    "best_of": ([1, 64, None], [0, -1, 65]),
    "seed": ([0, -(1 << 63), (1 << 64) - 1, None], [-(1 << 63) - 1, 1 << 64]),
}


def cases(table, extra):
    for field, (accepted, refused) in table.items():
        yield from ((field, value) for value in [*refused, *extra] if not (value is None and None in accepted))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *cases(REALS, [NAN, INF, -INF, np.float32(NAN), True, np.True_, *NO_NUMBERS]),
        *cases(INTEGERS, [NAN, INF, 1.5, 1.0, True, np.True_, np.float64(1), *NO_NUMBERS]),
    ],
)
def test_numbers_out_of_bounds_are_refused_by_name(field, value):
    with pytest.raises(InvalidRequestError, match=rf"^{field} must be"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize("arguments", [*({field: 10**400} for field in REALS), {"logit_bias": {1: 10**400}}])
def test_integers_beyond_all_floats_are_refused(arguments):
    with pytest.raises(InvalidRequestError):
        SamplingParams(**arguments)


@pytest.mark.parametrize("field", ["ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"])
@pytest.mark.parametrize("value", ["false", 1, None])
def test_booleans_are_booleans(field, value):
    with pytest.raises(InvalidRequestError, match=rf"^{field} must be"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"), [(f, v) for t in (REALS, INTEGERS) for f, (accepted, _) in t.items() for v in accepted]
)
def test_bounds_are_inclusive(field, value):
    assert getattr(SamplingParams(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("temperature", np.float32(0.5), float),
        ("top_p", np.float64(0.5), float),
        ("top_p", np.int64(1), float),
        ("temperature", 1, float),
        ("min_p", fractions.Fraction(1, 2), float),
        ("n", np.int32(2), int),
        ("seed", np.uint64(5), int),
        ("top_k", np.int8(5), int),
        ("max_tokens", np.int64(5), int),
    ],
)
def test_numpy_scalars_become_python_numbers(field, value, kind):
    found = getattr(SamplingParams(**{field: value}), field)
    assert found == value
    assert type(found) is kind


@pytest.mark.parametrize(
    "value", [5, 1.5, True, [""], ["a", ""], [1], [None], [b"a"], ["x" * 1025], ["x"] * 65, [["x"]]]
)
@pytest.mark.parametrize("field", ["stop", "bad_words"])
def test_strings(field, value):
    with pytest.raises(InvalidRequestError, match=rf"^{field} "):
        SamplingParams(**{field: value})


@pytest.mark.parametrize("field", ["stop", "bad_words"])
def test_one_string_is_a_list_of_one(field):
    assert getattr(SamplingParams(**{field: "word"}), field) == ("word",)
    assert getattr(SamplingParams(**{field: ["a", "b"]}), field) == ("a", "b")
    assert getattr(SamplingParams(**{field: None}), field) == ()
    assert getattr(SamplingParams(**{field: ["x" * 1024] * 64}), field) == ("x" * 1024,) * 64


@pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids"])
@pytest.mark.parametrize("value", [5, True, "12", [1.0], ["1"], [True], [-1], [None], [1, NAN], [[1]]])
def test_token_ids(field, value):
    with pytest.raises(InvalidRequestError, match=rf"^{field} "):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    "arguments",
    [
        {"stop_token_ids": range(65)},
        {"allowed_token_ids": range((1 << 20) + 1)},
        {"logit_bias": dict.fromkeys(range(301), 0)},
    ],
)
def test_huge_lists_are_refused(arguments):
    [field] = arguments
    with pytest.raises(InvalidRequestError, match=rf"^{field} .*at most"):
        SamplingParams(**arguments)


def test_token_ids_are_normalised():
    params = SamplingParams(
        stop_token_ids=np.array([5, 6]), allowed_token_ids=[np.int32(7)], logit_bias={np.int64(3): np.float32(1)}
    )
    assert (params.stop_token_ids, params.allowed_token_ids, params.logit_bias) == ((5, 6), (7,), {3: 1.0})
    assert {type(x) for x in (*params.stop_token_ids, *params.allowed_token_ids, *params.logit_bias)} == {int}
    assert SamplingParams(stop_token_ids=None).stop_token_ids == ()
    assert SamplingParams(allowed_token_ids=None).allowed_token_ids is None


def test_allowing_no_token_is_refused():
    with pytest.raises(InvalidRequestError, match="allowed_token_ids is empty"):
        SamplingParams(allowed_token_ids=[])


@pytest.mark.parametrize(
    "bias",
    [5, [1], "x", {"1": 1.0}, {1.0: 1.0}, {True: 1.0}, {-1: 1.0}, {1: NAN}, {1: INF}, {1: "x"}, {1: None}, {1: True}],
)
def test_logit_bias(bias):
    with pytest.raises(InvalidRequestError, match=r"^logit_bias must"):
        SamplingParams(logit_bias=bias)


def test_logit_bias_is_clamped():
    assert SamplingParams(logit_bias={1: 1e30, 2: -101, 3: 5}).logit_bias == {1: 100.0, 2: -100.0, 3: 5.0}


def test_fields_that_contradict_each_other():
    with pytest.raises(InvalidRequestError, match="min_tokens=5 is above max_tokens=4"):
        SamplingParams(min_tokens=5, max_tokens=4)
    assert SamplingParams(min_tokens=5, max_tokens=None).min_tokens == 5
    with pytest.raises(InvalidRequestError, match="detokenize=True"):
        SamplingParams(stop="x", detokenize=False)


@pytest.mark.parametrize("kind", ["DELTA", 1, None])
def test_output_kind(kind):
    with pytest.raises(InvalidRequestError, match=r"^output_kind must"):
        SamplingParams(output_kind=kind)
    assert SamplingParams().output_kind is RequestOutputKind.CUMULATIVE


def test_structured_outputs_and_what_contradicts_them():
    one = StructuredOutputsParams(choice=["a", "b"])
    assert SamplingParams(structured_outputs=one).structured_outputs is one
    for arguments, message in (
        ({"structured_outputs": {"json": {}}}, "must be a StructuredOutputsParams"),
        ({"structured_outputs": one, "ignore_eos": True}, "ignore_eos must be False"),
    ):
        with pytest.raises(JpagedError, match=message):
            SamplingParams(**arguments)


def test_unknown_names_are_refused():
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=0.5)


def test_what_the_parameters_need():
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams().greedy
    assert not SamplingParams().needs_rules
    assert not SamplingParams().needs_penalties
    for rules in ({"logit_bias": {1: 1}}, {"bad_words": ["x"]}, {"allowed_token_ids": [1]}, {"min_tokens": 1}):
        assert SamplingParams(**rules).needs_rules
    for penalties in ({"presence_penalty": 1}, {"frequency_penalty": -1}, {"repetition_penalty": 1.1}):
        assert SamplingParams(**penalties).needs_penalties


BEAMS = {"use_beam_search": True, "temperature": 0}


def test_groups():
    assert SamplingParams(n=3).num_sequences == 3
    drawn = SamplingParams(n=2, best_of=5)
    assert (drawn.num_sequences, drawn.ranks_samples) == (5, True)
    searched = SamplingParams(n=2, best_of=5, length_penalty=-5, early_stopping="never", **BEAMS)
    assert (searched.num_sequences, searched.ranks_samples) == (5, False)
    assert SamplingParams(early_stopping=True, **BEAMS).num_sequences == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 3, "best_of": 2}, "nothing to choose from"),
        ({"best_of": 2, "temperature": 0}, "all be the same"),
        ({"use_beam_search": True}, "temperature=0"),
        ({"use_beam_search": 1, "temperature": 0}, "use_beam_search must be"),
        ({"early_stopping": True}, "need use_beam_search"),
        ({"length_penalty": 2}, "need use_beam_search"),
        (BEAMS | {"early_stopping": 1}, "early_stopping must be"),
        (BEAMS | {"early_stopping": "always"}, "early_stopping must be"),
    ],
)
def test_contradictions_in_groups_are_refused(arguments, message):
    with pytest.raises(JpagedError, match=message):
        SamplingParams(**arguments)


def test_every_number_and_list_has_an_upper_bound():
    """A new field must be added to a table here, or to the lists that the tests above bound."""
    others = {
        "stop",
        "stop_token_ids",
        "bad_words",
        "ignore_eos",
        "detokenize",
        "skip_special_tokens",
        "include_stop_str_in_output",
        "output_kind",
        "logit_bias",
        "allowed_token_ids",
        "early_stopping",
        "use_beam_search",
        "structured_outputs",
    }
    assert {f.name for f in dataclasses.fields(SamplingParams)} == set(REALS) | set(INTEGERS) | others


def test_params_are_values():
    assert SamplingParams(stop=["x"]) == SamplingParams(stop=("x",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().n = 2
