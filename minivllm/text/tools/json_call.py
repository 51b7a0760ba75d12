"""A call that is written as one JSON object: ``{"name": "f", "arguments": {...}}``.

Llama's models say "parameters" for the same thing; both words are read everywhere. Mistral's add an "id", others a "type":
what else stands in the object is not looked at. But an object whose first member is none of these is some other JSON, and is
let through as content without waiting for a name to come.
"""

from typing import Final

from minivllm.text.tools.call_text import CallText, Steps

_ARGUMENTS: Final = ("arguments", "parameters")
_FIRST: Final = ("name", "id", "type", *_ARGUMENTS)


def json_call(text: CallText) -> Steps[bool]:
    """Take the object of the open call; False where it is not well formed. One that is no call (``CallLog.refuse``) is taken to
    its end all the same: what stands in its strings is no call either."""
    if not (yield from text.take("{")):
        return False
    is_first = True
    while True:
        yield from text.space()
        key = yield from text.string()
        yield from text.space()
        if key is None or not (yield from text.take(":")):
            return False
        if is_first and key not in _FIRST:
            text.log.refuse()
        is_first = False
        yield from text.space()
        if not (yield from _member(text, key)):
            return False
        yield from text.space()
        if (yield from text.take("}")):
            return True
        if not (yield from text.take(",")):
            return False


def _member(text: CallText, key: str) -> Steps[bool]:
    """Take the value of one member."""
    following = yield from text.following()
    if key == "name" and following == '"':
        name = yield from text.string()
        if name is not None:
            text.log.name(name)
        return name is not None
    if key in _ARGUMENTS and following == "{":
        return (yield from text.arguments())
    if key == "name" or key in _ARGUMENTS:
        text.log.refuse()
    return (yield from text.value()) is not None
