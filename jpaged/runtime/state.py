"""BatchState: what the device remembers of every row between steps.

A row is a running sequence's permanent place. When a sequence is admitted, its tokens, its block table and
its sampling parameters are uploaded once; from then on a step tells the device only which rows advance, and
the tokens that it samples stay where the next step finds them (DESIGN, contract 4).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.sampling_params import MAX_BAD_WORDS, MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS
from jpaged.scheduling.plan import Edits
from jpaged.sequence import Sequence

NO_TOKEN = -1
MAX_BAD_WORD_TOKENS = 8
# A bad word has two spellings (with and without a leading space); the model's own end tokens join the stop ids.
MAX_BAD_SEQUENCES = 2 * MAX_BAD_WORDS
MAX_SUPPRESSED = MAX_STOP_TOKEN_IDS + 16

FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
INTEGERS = ("top_k", "seed_high", "seed_low", "sequence_index", "prompt_length", "needs_rules")
NUM_PARAMETERS = len(FLOATS) + len(INTEGERS)


Array = Any  # a jax.Array on the device; a NumPy array of one row on its way there


class Rules(NamedTuple):
    """Token-by-token edits of the logits of each row; read only by steps whose variant has `rules`, and for rows whose
    sequence `needs_rules`: the others have what an earlier sequence has left there."""

    bias_tokens: Array  # int32 [rows, MAX_LOGIT_BIAS], NO_TOKEN where unused
    bias_values: Array  # float32 [rows, MAX_LOGIT_BIAS]
    allowed: Array  # uint32 [rows, ceil(V / 32)]: a bit a token
    bad_words: Array  # int32 [rows, MAX_BAD_SEQUENCES, MAX_BAD_WORD_TOKENS], padded in front with NO_TOKEN
    suppressed: Array  # int32 [rows, MAX_SUPPRESSED]: not before min_length
    min_length: Array  # int32 [rows]


class BatchState(NamedTuple):
    """One entry a row; the last row is the null row that padding writes to."""

    tokens: jax.Array  # int32 [rows, max_model_len]: known and sampled tokens by position
    tables: jax.Array  # int32 [rows, W * G]: block tables, as `RowTables` has them
    parameters: jax.Array  # int32 [rows, NUM_PARAMETERS]: FLOATS (bits) then INTEGERS
    rules: Rules


def empty(num_rows: int, max_model_len: int, table_width: int, vocab_size: int) -> BatchState:
    """The state of a batch without sequences; `num_rows` does not count the null row."""
    rows = num_rows + 1
    rules = Rules(
        bias_tokens=jnp.full((rows, MAX_LOGIT_BIAS), NO_TOKEN, jnp.int32),
        bias_values=jnp.zeros((rows, MAX_LOGIT_BIAS), jnp.float32),
        allowed=jnp.full((rows, -(-vocab_size // 32)), 0xFFFFFFFF, jnp.uint32),
        bad_words=jnp.full((rows, MAX_BAD_SEQUENCES, MAX_BAD_WORD_TOKENS), NO_TOKEN, jnp.int32),
        suppressed=jnp.full((rows, MAX_SUPPRESSED), NO_TOKEN, jnp.int32),
        min_length=jnp.zeros((rows,), jnp.int32),
    )
    return BatchState(
        tokens=jnp.zeros((rows, max_model_len), jnp.int32),
        tables=jnp.zeros((rows, table_width), jnp.int32),
        parameters=jnp.zeros((rows, NUM_PARAMETERS), jnp.int32),
        rules=rules,
    )


def pack_admission(sequence: Sequence, table: np.ndarray, max_model_len: int) -> np.ndarray:
    """A sequence's row as one int32 array: row | parameters | tokens [max_model_len] | table [W * G]."""
    params, seed = sequence.group.params, sequence.group.seed
    head = 1 + NUM_PARAMETERS
    packed = np.zeros(head + max_model_len + len(table), np.int32)
    packed[0] = sequence.row
    packed[1 : 1 + len(FLOATS)].view(np.float32)[:] = [getattr(params, name) for name in FLOATS]
    integers = packed[1 + len(FLOATS) : head].view(np.uint32)
    integers[:] = (
        max(params.top_k, 0),
        seed >> 32,
        seed & 0xFFFFFFFF,
        sequence.index,
        len(sequence.group.prompt_token_ids),
        params.needs_rules,
    )
    packed[head : head + len(sequence.tokens)] = sequence.tokens
    packed[head + max_model_len :] = table
    return packed


def admit(state: BatchState, packed: jax.Array) -> BatchState:
    """Writes a row that `pack_admission` made."""
    max_model_len = state.tokens.shape[1]
    row, head = packed[0], 1 + NUM_PARAMETERS
    return state._replace(
        parameters=state.parameters.at[row].set(packed[1:head]),
        tokens=state.tokens.at[row].set(packed[head : head + max_model_len]),
        tables=state.tables.at[row].set(packed[head + max_model_len :]),
    )


def pack_edits(edits: Edits, size: int, null_row: int) -> np.ndarray:
    """The host's changes to rows as int32 [5, size]: fork sources | fork rows | rows | positions | tokens."""
    packed = np.full((5, size), null_row, np.int32)
    packed[:2, : len(edits.forks)] = np.array(edits.forks, np.int32).reshape(-1, 2).T
    packed[3:] = 0
    packed[2:, : len(edits.tokens)] = np.array(edits.tokens, np.int32).reshape(-1, 3).T
    return packed


def edit(state: BatchState, packed: jax.Array) -> BatchState:
    """Forks rows, then writes tokens; `pack_edits` made the changes. Padding changes the null row alone."""
    sources, forks, rows, positions, values = packed
    tokens = state.tokens.at[forks].set(state.tokens[sources])
    return state._replace(
        tokens=tokens.at[rows, positions].set(values), tables=state.tables.at[forks].set(state.tables[sources])
    )


def rules_of(sequence: Sequence, vocab_size: int, bad_words: list[list[int]]) -> Rules:
    """One row's rules as NumPy arrays (the leading axis left out)."""
    params = sequence.group.params
    bias_tokens = np.full(MAX_LOGIT_BIAS, NO_TOKEN, np.int32)
    bias_values = np.zeros(MAX_LOGIT_BIAS, np.float32)
    for i, (token, value) in enumerate((params.logit_bias or {}).items()):
        bias_tokens[i], bias_values[i] = token, value
    bits = np.ones(-(-vocab_size // 32) * 32, np.uint8)
    if params.allowed_token_ids is not None:
        bits[:] = 0
        bits[list(params.allowed_token_ids)] = 1
    words = np.full((MAX_BAD_SEQUENCES, MAX_BAD_WORD_TOKENS), NO_TOKEN, np.int32)
    for i, word in enumerate(bad_words):
        words[i, -len(word) :] = word
    suppressed = np.full(MAX_SUPPRESSED, NO_TOKEN, np.int32)
    stops = sorted(sequence.stop_token_ids)
    suppressed[: len(stops)] = stops
    return Rules(
        bias_tokens,
        bias_values,
        np.packbits(bits, bitorder="little").view(np.uint32),
        words,
        suppressed,
        np.int32(len(sequence.group.prompt_token_ids) + params.min_tokens),
    )


def set_rules(state: BatchState, row: jax.Array, rules: Rules) -> BatchState:
    """Writes the rules of one row."""
    written = [old.at[row].set(new) for old, new in zip(state.rules, rules, strict=True)]
    return state._replace(rules=Rules(*written))
