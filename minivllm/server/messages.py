"""A chat's messages: what clients send, checked, and as templates want them.

Templates are written for what transformers hands them: the content is a text, the arguments of a call are an object and not
its JSON text, and a field that was not given is not there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from minivllm.errors import InvalidRequest, MalformedBody, UnsupportedField
from minivllm.server.fields import MESSAGE_NOT_SERVED, check_not_served
from minivllm.text.depth import check_depth

WITH_FIELDS = frozenset({"tools", "documents", "reasoning_effort"})  # values of a template that have a field of their own
Message = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """A conversation as a template takes it."""

    messages: Sequence[Message]
    add_generation_prompt: bool
    continue_final_message: bool
    values: Mapping[str, Any]  # further names that the template reads


class FunctionCall(msgspec.Struct, forbid_unknown_fields=True):
    """Which function was called, and with what, as JSON text."""

    name: str
    arguments: str = "{}"


class ToolCall(msgspec.Struct):
    """A call that the assistant made."""

    function: FunctionCall
    id: str | None = None
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct):
    """One message; content is a text or parts of type "text"."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None  # an assistant's
    tool_call_id: str | None = None  # of a "tool": the call that this is the result of
    reasoning: str | None = None  # an assistant's
    reasoning_content: str | None = None  # its older name


def messages_of(messages: Sequence[dict[str, Any]]) -> list[Message]:
    """The chat's messages as templates want them. Raises ``InvalidRequest``, ``MalformedBody``, ``UnsupportedField`` with the
    place in ``param``."""
    if not messages:
        raise InvalidRequest("messages is empty; send at least one message.", "messages")
    return [_message(f"messages[{i}]", m) for i, m in enumerate(messages)]


def _message(place: str, fields: dict[str, Any]) -> Message:
    """One message, checked."""
    for name, value in fields.items():
        if name not in ChatMessage.__struct_fields__:
            try:
                check_not_served(name, value, MESSAGE_NOT_SERVED)
            except UnsupportedField:
                raise UnsupportedField(f"{place}.{name}") from None
    try:
        message = msgspec.convert(fields, ChatMessage)
    except msgspec.ValidationError as e:
        reason = str(e).split(" - at ")[0]
        reason = "Unknown role" if reason.startswith("Invalid enum value") else reason
        raise MalformedBody(f"{reason} in {place}; a message has a role and a text as its content.", f"body.{place}") from None
    _check_role(place, message)
    plain: Message = {"role": message.role, "content": _content(place, message)}
    plain |= {name: value for name in ("name", "tool_call_id") if (value := getattr(message, name)) is not None}
    if message.tool_calls:
        plain["tool_calls"] = [_call(f"{place}.tool_calls[{i}]", call) for i, call in enumerate(message.tool_calls)]
    if reasoning := message.reasoning or message.reasoning_content:
        plain |= {"reasoning": reasoning, "reasoning_content": reasoning}  # templates read one or the other
    return plain


def _check_role(place: str, message: ChatMessage) -> None:
    """Raise ``MalformedBody`` for fields that the message's role does not have."""
    says_something = message.tool_calls or message.reasoning or message.reasoning_content
    if message.content is None and not (message.role == "assistant" and says_something):
        raise MalformedBody(f"{place} has no content; only an assistant's message with tool_calls needs none.", f"body.{place}")
    if says_something and message.role != "assistant":
        raise MalformedBody(f"{place} has tool_calls or reasoning, which only an assistant's message has.", f"body.{place}")
    if message.tool_call_id is not None and message.role != "tool":
        raise MalformedBody(f'{place} has a tool_call_id, which only a message of role "tool" has.', f"body.{place}")


def _content(place: str, message: ChatMessage) -> str | list[dict[str, str]]:
    """The text, or the texts, of a message."""
    content = message.content
    if content is None or isinstance(content, str):
        return content or ""
    return [{"type": "text", "text": _text_part(f"{place}.content[{i}]", part)} for i, part in enumerate(content)]


def _call(place: str, call: ToolCall) -> dict[str, Any]:
    """A call that was made, with its arguments as an object."""
    check_depth(call.function.arguments.encode(), f"body.{place}.function.arguments")
    try:
        arguments = msgspec.json.decode(call.function.arguments, type=dict[str, Any])
    except msgspec.DecodeError:
        problem = f"The arguments of {place} are not the JSON text of an object."
        raise MalformedBody(problem, f"body.{place}.function.arguments") from None
    named = {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}
    return named if call.id is None else {"id": call.id, **named}


def _text_part(place: str, part: dict[str, Any]) -> str:
    """The text of one content part."""
    if part.get("type") != "text":
        raise UnsupportedField(f"{place}.type", 'only parts of type "text" are served')
    text = part.get("text")
    if not isinstance(text, str) or len(part) != 2:
        raise MalformedBody('A text part is {"type": "text", "text": "..."} and nothing else.', f"body.{place}")
    return text


def chat_of(
    messages: Sequence[dict[str, Any]],
    reads: frozenset[str],
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    values: Mapping[str, Any],
) -> Chat:
    """A conversation for a template that ``reads`` these names. ``values``: what the request's fields and its
    ``chat_template_kwargs`` give. Raises ``InvalidRequest``, ``MalformedBody``, ``UnsupportedField``."""
    given = {name: value for name, value in values.items() if name in WITH_FIELDS and value}
    for name in given:
        if name not in reads:
            raise UnsupportedField(name, "the chat template does not read it; leave it out, or serve with another template")
    for name, value in (values.get("chat_template_kwargs") or {}).items():
        if name not in reads or name in WITH_FIELDS:
            known = ", ".join(sorted(reads - WITH_FIELDS)) or "nothing of the kind"
            problem = f"This model's chat template does not read {name!r} from chat_template_kwargs; it reads {known}."
            raise InvalidRequest(problem, f"chat_template_kwargs.{name}")
        given[name] = value
    goes_on = bool(continue_final_message)
    adds = (not goes_on) if add_generation_prompt is None else add_generation_prompt
    return Chat(messages_of(messages), adds, goes_on, given)
