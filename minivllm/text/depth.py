"""How deep a JSON text is nested, before anybody parses it.

Parsers, and whoever walks what they made, go down by recursion, and Python's stack is short: a thousand brackets are two lines
of a request. So the depth is bounded first. Only brackets outside strings are looked at one by one; what leaves them alone
in the text runs in C.
"""

from typing import Final

from minivllm.errors import InvalidRequest

MAX_DEPTH: Final = 100  # an object in a schema takes two levels; templates and grammars walk this deep without trouble
_TO_ROUND: Final = bytes.maketrans(b"[]{}", b"()()")
_NOT_KEPT: Final = bytes(code for code in range(256) if code not in b'[]{}"')
_OPENS: Final = ord("(")


def check_depth(text: bytes, param: str = "body") -> None:
    """Raise ``InvalidRequest`` for JSON whose lists and objects stand more than ``MAX_DEPTH`` deep in one another."""
    if text.count(b"[") + text.count(b"{") <= MAX_DEPTH:
        return
    plain = text.replace(rb"\\", b"").replace(rb"\"", b"").translate(_TO_ROUND, _NOT_KEPT)
    depth = 0
    for bracket in b"".join(plain.split(b'"')[::2]):  # those that stand outside strings
        depth += 1 if bracket == _OPENS else -1
        if depth > MAX_DEPTH:
            raise InvalidRequest(f"The JSON is nested more than {MAX_DEPTH} deep; send a flatter object.", param)
