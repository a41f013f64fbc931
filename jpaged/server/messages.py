"""From a chat request to the text that the model's template makes of it."""

import json
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.meta

from jpaged.server.errors import ApiError
from jpaged.server.prompts import TokenizedPrompt
from jpaged.server.protocol import ChatFields, Message, Tool
from jpaged.tokenization import render_chat

if TYPE_CHECKING:
    from jpaged.tokenization import Tokenizer

_NOT_FROM_REQUESTS = {
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "bos_token",
    "eos_token",
    "raise_exception",
}


def render(tokenizer: "Tokenizer", messages: list[Message], fields: ChatFields, *, with_tools: bool) -> TokenizedPrompt:
    """The prompt of a chat. Runs templates and tokenises: not for the event loop.

    Raises:
      ApiError, InvalidRequestError: the template does not take these messages, tools or arguments.
    """
    if fields.continue_final_message and fields.add_generation_prompt:
        raise ApiError(400, "continue_final_message and add_generation_prompt exclude each other.")
    begin = not fields.continue_final_message if fields.add_generation_prompt is None else fields.add_generation_prompt
    reads = _variables(tokenizer) if with_tools or fields.chat_template_kwargs else set()
    variables = fields.chat_template_kwargs or {}
    for name in variables:
        if name not in reads or name in _NOT_FROM_REQUESTS:
            message = f"the model's chat template takes no argument {name!r} from requests."
            raise ApiError(400, message, param="chat_template_kwargs")
    if with_tools and "tools" not in reads:
        raise ApiError(400, "the model's chat template has no place for tools.", param="tools", code="unsupported")
    text = render_chat(
        [_as_dict(message) for message in messages],
        tokenizer,
        add_generation_prompt=begin,
        continue_final_message=fields.continue_final_message,
        tools=[_tool(tool) for tool in fields.tools or ()] if with_tools else None,
        variables=variables,
    )
    tokens = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return TokenizedPrompt(text=text, tokens=tokens)


def _variables(tokenizer: "Tokenizer") -> set[str]:
    """What the chat template reads."""
    template = tokenizer.chat_template
    if not isinstance(template, str):
        return set()
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])  # noqa: S701  # nothing is rendered
    source = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")  # transformers' own tag
    try:
        return jinja2.meta.find_undeclared_variables(environment.parse(source))
    except jinja2.TemplateError as error:
        raise ApiError(400, f"the model's chat template can't be read: {error}") from error


def _tool(tool: Tool) -> dict[str, Any]:
    return tool.model_dump(exclude_none=True)


def _as_dict(message: Message) -> dict[str, Any]:
    content = message.content
    if isinstance(content, list):
        for part in content:
            if part.type != "text" or part.text is None:
                raise ApiError(400, f"content of type {part.type!r} is not supported: text only.", param="messages")
        content = "".join(part.text or "" for part in content)
    if content is None and not message.tool_calls:
        raise ApiError(400, f"a message of role {message.role!r} needs a content.", param="messages")
    given: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": content}
    if message.tool_calls:
        given["tool_calls"] = [
            _tool_call(call.id, call.function.name, call.function.arguments) for call in message.tool_calls
        ]
        given["content"] = content or ""
    for name in ("name", "tool_call_id"):
        if getattr(message, name) is not None:
            given[name] = getattr(message, name)
    return given


def _tool_call(identity: str, name: str, arguments: str) -> dict[str, Any]:
    """Templates want the arguments as a dictionary; clients send them as JSON in a string."""
    try:
        decoded = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        decoded = None
    if not isinstance(decoded, dict):
        raise ApiError(400, "the arguments of a tool call must be a JSON object in a string.", param="messages")
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": decoded}}
