"""Names that users of vLLM know: flags, endpoints, fields and metrics are spelled as there."""

import dataclasses
import re

import pytest

from jpaged import RequestOutput, SamplingParams, StructuredOutputsParams
from jpaged.cli.main import COMMANDS, main
from jpaged.outputs import CompletionOutput
from jpaged.server.protocol import ChatRequest, CompletionRequest
from tests.server.support import serving

FLAGS = """--host --port --uds --api-key --served-model-name --chat-template --root-path --ssl-keyfile --ssl-certfile
--allowed-origins --enable-request-id-headers --enable-auto-tool-choice --tool-call-parser --enable-log-requests
--disable-log-stats --shutdown-timeout --max-model-len --max-num-seqs --max-num-batched-tokens --scheduling-policy
--max-num-queued-reqs --max-num-queued-tokens --block-size --gpu-memory-utilization --kv-cache-memory-bytes
--kv-cache-dtype --swap-space --enable-prefix-caching --max-logprobs --tensor-parallel-size -tp --dtype --seed
--generation-config --speculative-config"""
BENCH_FLAGS = """--backend --endpoint --dataset-name --dataset-path --num-prompts --request-rate --burstiness
--max-concurrency --num-warmups --ignore-eos --percentile-metrics --metric-percentiles --goodput --save-result"""
VERBS = "serve,generate,chat,bench serve,bench throughput,bench latency,bench startup,convert,run-batch,collect-env"
ENDPOINTS = """/v1/completions /v1/chat/completions /v1/models /tokenize /detokenize /health /version /load /metrics /ping
/v1/embeddings /v1/score /reset_prefix_cache /pause /resume /abort_requests"""
FIELDS = """top_k min_p repetition_penalty use_beam_search length_penalty stop_token_ids include_stop_str_in_output
ignore_eos min_tokens skip_special_tokens truncate_prompt_tokens prompt_logprobs allowed_token_ids bad_words
structured_outputs priority request_id cache_salt return_token_ids"""
CHAT_FIELDS = "add_generation_prompt continue_final_message"
SAMPLING = """n best_of presence_penalty frequency_penalty repetition_penalty temperature top_p top_k min_p seed stop
stop_token_ids bad_words ignore_eos max_tokens min_tokens logprobs prompt_logprobs detokenize skip_special_tokens
include_stop_str_in_output output_kind structured_outputs logit_bias allowed_token_ids use_beam_search length_penalty
early_stopping"""
REQUEST_OUTPUT = "request_id prompt prompt_token_ids prompt_logprobs outputs finished metrics num_cached_tokens"
COMPLETION_OUTPUT = "index text token_ids cumulative_logprob logprobs finish_reason stop_reason"
GAUGES = """num_requests_running num_requests_waiting num_requests_swapped kv_cache_usage_perc cpu_cache_usage_perc"""
COUNTERS = """num_preemptions prompt_tokens generation_tokens prefix_cache_queries prefix_cache_hits request_success
admission_rejections"""
HISTOGRAMS = """time_to_first_token_seconds inter_token_latency_seconds e2e_request_latency_seconds
request_queue_time_seconds request_prefill_time_seconds request_decode_time_seconds request_prompt_tokens
request_generation_tokens request_params_n iteration_tokens_total"""


@pytest.mark.parametrize(("command", "flags"), [("serve", FLAGS), ("bench serve", BENCH_FLAGS)])
def test_flags(command, flags, capsys):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    assert set(flags.split()) <= set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", capsys.readouterr().out))


def test_a_flag_that_we_lack_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--enable-lora"])
    assert "--enable-lora" in capsys.readouterr().err


def test_verbs():
    assert {tuple(verb.split()) for verb in VERBS.split(",")} <= set(COMMANDS)


def test_endpoints(tiny):
    with serving(tiny(), enable_admin_endpoints=True) as live:
        assert set(ENDPOINTS.split()) <= set(live.http.get("/openapi.json").json()["paths"])


def test_fields():
    assert set(FIELDS.split()) <= set(CompletionRequest.model_fields)
    assert set(FIELDS.split()) | set(CHAT_FIELDS.split()) <= set(ChatRequest.model_fields)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (SamplingParams, SAMPLING),
        (StructuredOutputsParams, "json regex choice grammar json_object"),
        (RequestOutput, REQUEST_OUTPUT),
        (CompletionOutput, COMPLETION_OUTPUT),
    ],
)
def test_dataclasses(kind, names):
    assert set(names.split()) <= {field.name for field in dataclasses.fields(kind)}


def test_metrics(live):
    kinds = dict(re.findall(r"^# TYPE jpaged:(\w+) (\w+)$", live.http.get("/metrics").text, re.MULTILINE))
    assert {kinds.get(name) for name in GAUGES.split()} == {"gauge"}
    assert {kinds.get(f"{name}_total") for name in COUNTERS.split()} == {"counter"}
    assert {kinds.get(name) for name in HISTOGRAMS.split()} == {"histogram"}
    assert "cache_config_info" in kinds
