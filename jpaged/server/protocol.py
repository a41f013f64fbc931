"""Requests as OpenAI's clients send them, with the fields that jpaged adds (vLLM's names).

A field that is not here is refused (400), and so are the values of known fields that ask for what jpaged does not do.
Numbers are bounded by `SamplingParams`, lists here; the body's size bounds what is left.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Text = Annotated[str, StringConstraints(max_length=4 << 20)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Tokens = Annotated[list[int], Field(max_length=1 << 20)]
Truncation = Annotated[int | None, Field(ge=1, le=1 << 24)]
Prompts = (
    Text
    | Annotated[list[Text], Field(max_length=1 << 16)]
    | Tokens
    | Annotated[list[Tokens], Field(max_length=1 << 16)]
)
"""A text, token ids, or several of them."""


class Strict(BaseModel):
    """No unknown fields, no numbers in strings, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool | None = None


class JsonSchema(Strict):
    name: Annotated[str, StringConstraints(max_length=64)]
    json_schema: dict[str, Any] = Field(alias="schema")
    description: Text | None = None
    strict: bool | None = None


class FormatOfText(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Strict):
    """See `jpaged.structured.params`: exactly one of them."""

    json_: Text | dict[str, Any] | None = Field(None, alias="json")
    regex: Text | None = None
    choice: Annotated[list[Text], Field(max_length=1024)] | None = None
    grammar: Text | None = None
    json_object: bool | None = None


class ToTheModel(Strict):
    """What every request to the model may say."""

    model: Name | None = None
    request_id: Name | None = None
    priority: int = Field(0, ge=-(1 << 31), le=(1 << 31) - 1)
    cache_salt: Annotated[str, StringConstraints(max_length=1024)] | None = None
    user: Annotated[str, StringConstraints(max_length=1024)] | None = None
    """Taken, and changes nothing."""


class Generation(ToTheModel):
    """What completions and chat completions have in common."""

    stream: bool | None = False
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: Truncation = None
    return_token_ids: bool | None = False

    n: int | None = None
    best_of: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=64)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=64)] | None = None
    bad_words: Annotated[list[str], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = Field(None, ge=0, le=1 << 24)
    min_tokens: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: (
        Annotated[dict[Annotated[str, StringConstraints(max_length=8)], float], Field(max_length=300)] | None
    ) = None
    allowed_token_ids: Tokens | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None

    response_format: FormatOfText | None = None
    structured_outputs: StructuredOutputs | None = None

    # What OpenAI's clients send and what changes nothing here.
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    safety_identifier: Annotated[str, StringConstraints(max_length=1024)] | None = None
    prompt_cache_key: Annotated[str, StringConstraints(max_length=1024)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: Prompts
    echo: bool | None = False
    logprobs: int | None = None
    suffix: str | None = None


class EmbeddingRequest(ToTheModel):
    """POST /v1/embeddings."""

    input: Prompts
    truncate_prompt_tokens: Truncation = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    pooling: Literal["last", "mean"] = "last"
    normalize: bool = True


class ScoreRequest(ToTheModel):
    """POST /v1/score: one prompt for all completions, or one for each."""

    prompts: Prompts
    completions: Prompts


class ContentPart(Strict):
    type: str
    text: Text | None = None


class FunctionCall(Strict):
    name: Name
    arguments: Text


class ToolCall(Strict):
    id: Name
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(BaseModel):
    """A message of a chat. What else clients send back with an assistant's message (refusal, audio) is dropped."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[ContentPart], Field(max_length=1024)] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: Name | None = None


class Function(Strict):
    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: Name


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


Messages = Annotated[list[Message], Field(min_length=1, max_length=4096)]


class ChatFields(Strict):
    """How a chat becomes a prompt."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: Annotated[dict[str, bool | int | float | str], Field(max_length=16)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None


class ChatRequest(Generation, ChatFields):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=0, le=1 << 24)
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None


class TokenizeRequest(ChatFields):
    """POST /tokenize: a prompt or messages."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = False


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: Name | None = None
    tokens: Tokens


class AbortRequest(Strict):
    """POST /abort_requests: some, or all."""

    request_ids: Annotated[list[Name], Field(max_length=4096)] | None = None


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """What every error looks like."""

    error: ErrorDetail
