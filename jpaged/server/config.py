"""ServerConfig: what the HTTP side is told. Flags of `jpaged serve` come from here; names are vLLM's."""

import dataclasses
from typing import Literal

from jpaged.errors import InvalidConfigError
from jpaged.logs import LogFormat


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of the server.

    Raises:
      InvalidConfigError: a value is out of range.
    """

    host: str = "127.0.0.1"
    """Address to listen on. The default takes connections from this machine alone."""
    port: int = 8000
    """TCP port; 0: a free one."""
    uds: str | None = None
    """Path of a Unix socket to listen on, instead of host and port."""
    api_key: tuple[str, ...] = ()
    """Keys, one of which every request but /health must bring as "Authorization: Bearer KEY". Also taken, one or more
    separated by commas, from the environment variable JPAGED_API_KEY, where other users of the machine can't see it."""
    served_model_name: tuple[str, ...] = ()
    """Names under which the model is served; the first is in the answers. Default: the model's own."""
    chat_template: str | None = None
    """File with a Jinja template to use instead of the model's own."""
    root_path: str = ""
    """Path under which a proxy serves this server."""
    ssl_keyfile: str | None = None
    """File with the TLS key."""
    ssl_certfile: str | None = None
    """File with the TLS certificate."""
    allowed_origins: tuple[str, ...] = ()
    """Origins of web pages whose scripts may call the server (CORS); "*": all."""
    enable_request_id_headers: bool = False
    """Answer with an X-Request-Id header: the request's, or a new one."""
    enable_auto_tool_choice: bool = False
    """Let the model decide to call tools; needs tool_call_parser."""
    tool_call_parser: Literal["hermes", "llama3_json", "mistral"] | None = None
    """How the model writes tool calls. hermes: Qwen, SmolLM 3 and others; llama3_json: Llama 3; mistral: Mistral."""
    enable_log_requests: bool = False
    """Log each request's id, sizes and end (never its text)."""
    disable_log_stats: bool = False
    """Do not log a line of statistics every ten seconds."""
    log_format: LogFormat = "text"
    """How log lines are written: as text, or each as a JSON object."""
    slow_step: float = 5.0
    """Seconds from which on a step is logged as slow."""
    otlp_traces_endpoint: str | None = None
    """Where to send OpenTelemetry spans, over OTLP/HTTP: http://127.0.0.1:4318/v1/traces, say."""
    enable_admin_endpoints: bool = False
    """Offer /reset_prefix_cache, /pause, /resume and /abort_requests."""
    enable_ui: bool = False
    """Offer /ui, a page that shows the KV pool and the requests as they run, never a request's text."""
    shutdown_timeout: float = 30.0
    """Seconds that requests in flight get to finish after SIGTERM."""
    step_timeout: float = 60.0
    """Seconds after which a step counts as stuck: requests fail, /health turns 503, the process ends."""
    snapshot_dir: str | None = None
    """Folder from which a server goes on where the one before it ended, or was killed: unfinished requests are
    resumed, and their clients come back by GET /v1/requests/ID. Each request is written there before it is answered."""
    snapshot_interval: float = 60.0
    """Seconds between two snapshots of what has been generated; after a crash, what came later is computed again. 0:
    only when the server stops."""
    snapshot_pool: bool = False
    """When the server stops, write the prefix cache too, with its keys and values: the next server computes less again.
    It is as large as the pool, at most."""
    result_ttl: float = 3600.0
    """With a snapshot_dir: seconds that the result of a request that its client has named is kept."""
    max_kept_results: int = 1024
    """Most finished requests that are kept; the oldest go first."""
    max_num_queued_reqs: int = 1024
    """Most requests that wait for a place in the batch; more are answered 503 with Retry-After."""
    max_num_queued_tokens: int = 1 << 22
    """Most prompt tokens of the requests that wait."""
    max_body_bytes: int = 4 << 20
    """Most bytes of a request's body; more are answered 413."""
    max_prompts: int = 256
    """Most prompts of one request."""
    max_logprobs: int = 20
    """Most log-probabilities a position; at most 20."""
    generation_config: Literal["auto", "none"] = "auto"
    """auto: sampling defaults (temperature, top_p, ...) from the model's generation_config. none: OpenAI's."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("port", 0, 65535),
            ("shutdown_timeout", 0, 86400),
            ("step_timeout", 0.1, 86400),
            ("slow_step", 0.001, 86400),
            ("snapshot_interval", 0, 86400),
            ("result_ttl", 0, 86400 * 365),
            ("max_kept_results", 0, 1 << 20),
            ("max_num_queued_reqs", 1, 1 << 20),
            ("max_num_queued_tokens", 1, 1 << 40),
            ("max_body_bytes", 1024, 1 << 30),
            ("max_prompts", 1, 1 << 16),
            ("max_logprobs", 0, 20),
        ):
            if not low <= getattr(self, name) <= high:
                raise InvalidConfigError(f"{name}={getattr(self, name)!r} must be in [{low}, {high}].")
        if self.enable_auto_tool_choice and self.tool_call_parser is None:
            raise InvalidConfigError(
                "enable_auto_tool_choice needs a tool_call_parser: hermes, llama3_json or mistral."
            )
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise InvalidConfigError("TLS needs both ssl_keyfile and ssl_certfile.")
        if any(not key for key in self.api_key):
            raise InvalidConfigError("an api_key is empty.")
