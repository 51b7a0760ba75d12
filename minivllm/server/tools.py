"""Tools of a chat: what a request offers and demands, and what that asks of the text.

``tool_choice`` "auto" leaves it to the model; its text is searched for calls. "required", and a function's name, are demands:
a grammar holds the text to calls in the model's own format, so that they always parse. The same grammar holds where the model
begins a call by itself and a function is marked ``strict``. "none" leaves the tools out of the prompt. Without
``parallel_tool_calls`` one call is demanded, or told: of several that the model makes by itself the first.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from minivllm.errors import InvalidRequest, MalformedBody
from minivllm.text.reply import Function

MAX_TOOLS = 128
_NAME_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.")


class FunctionBody(msgspec.Struct, forbid_unknown_fields=True):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(msgspec.Struct, forbid_unknown_fields=True):
    """A tool; there are only functions."""

    function: FunctionBody
    type: Literal["function"]


class FunctionName(msgspec.Struct, forbid_unknown_fields=True):
    """A function, by its name."""

    name: str


class ToolChoice(msgspec.Struct, forbid_unknown_fields=True):
    """A demand for one function."""

    function: FunctionName
    type: Literal["function"]


Choice = Literal["none", "auto", "required"] | ToolChoice


@dataclass(frozen=True)
class Offer:
    """The functions that a reply may call, and whether it must."""

    functions: tuple[Function, ...] = ()  # empty: it calls none
    described: tuple[dict[str, Any], ...] = ()  # all tools, as the template shows them
    demanded: tuple[Function, ...] = ()  # one of these must be called
    named: bool = False  # the demand was for one by its name
    parallel: bool = True  # several calls may be made
    strict: bool = False  # what the model calls by itself is held to the schemas too


def offer_of(tools: Sequence[dict[str, Any]] | None, choice: Choice | None, parallel: bool | None) -> Offer:
    """What a request offers. Raises ``InvalidRequest``, ``MalformedBody``."""
    if not tools:
        if choice not in (None, "none"):
            raise InvalidRequest("tool_choice needs tools; send some, or leave it out.", "tool_choice")
        return Offer()
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"tools may hold at most {MAX_TOOLS} tools, got {len(tools)}.", "tools")
    bodies = [_tool(i, tool) for i, tool in enumerate(tools)]
    functions = tuple(Function(body.function.name, body.function.parameters or {}) for body in bodies)
    if len({function.name for function in functions}) < len(functions):
        raise InvalidRequest("Two tools have the same name; name each once.", "tools")
    if choice == "none":
        return Offer()
    demanded = functions if choice == "required" else ()
    if isinstance(choice, ToolChoice):
        demanded = tuple(function for function in functions if function.name == choice.function.name)
        if not demanded:
            raise InvalidRequest("tool_choice names a function that tools does not hold; name one of them.", "tool_choice")
    named = isinstance(choice, ToolChoice)
    return Offer(
        functions=functions,
        described=tuple(_described(tool) for tool in tools),
        demanded=demanded,
        named=named,
        parallel=parallel is not False and not named,
        strict=any(body.function.strict for body in bodies),
    )


def _tool(index: int, tool: dict[str, Any]) -> ToolBody:
    place = f"tools[{index}]"
    try:
        body = msgspec.convert(tool, ToolBody)
    except msgspec.ValidationError as e:
        raise MalformedBody(f"{str(e).split(' - at ')[0]} in {place}.", f"body.{place}") from None
    name = body.function.name
    if not 0 < len(name) <= 64 or not _NAME_CHARS.issuperset(name):
        raise InvalidRequest(f"The name of {place} must be 1 to 64 letters, digits, dots, dashes or underscores.", place)
    return body


def _described(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as its client wrote it, without what is meant for the server."""
    return {**tool, "function": {name: value for name, value in tool["function"].items() if name != "strict"}}


def new_call_id(short: bool) -> str:
    """An id for a call that nobody can guess. ``short``: nine letters and digits, which Mistral's templates insist on."""
    return uuid.uuid4().hex[:9] if short else f"call_{uuid.uuid4().hex[:24]}"
