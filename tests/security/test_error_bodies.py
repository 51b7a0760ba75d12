"""What an error tells: one formatter, at most 4 KiB, nothing of the inside, whichever exception it is and whatever it says."""

import inspect
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivllm import errors
from minivllm.errors import RequestError
from minivllm.server.replies import error_body, error_response

CLASSES = [
    found for found in vars(errors).values() if isinstance(found, type) and issubclass(found, RequestError)
]
INSIDE = [
    "<object object at 0x7f3a2b1c4d50>", "Traceback (most recent call last):\n  File \"/usr/x.py\", line 3, in f\nKeyError: 5",
    "File \"/usr/lib/python3/site-packages/minivllm/server/app.py\", line 3", "see /opt/minivllm/text/chat.py:12",
    "panicked at /opt/.cargo/registry/src/x/lib.rs:55:3", "a bound method C.f of <C at 0xDEADBEEF>",
]  # fmt: skip
texts = st.text(st.characters(codec=None, categories=["Cc", "Cs", "L", "Zl", "So"]), max_size=3000)
pieces = st.lists(texts | st.sampled_from(INSIDE) | st.sampled_from(['"', "\\", "\x00", "\ud800", "\U0001f98a"]), max_size=6)


def made(kind: type[RequestError], text: str, number: int) -> RequestError:
    """An error of this class, with ``text`` wherever it takes one."""
    values: dict[str, Any] = {"str": text, "int": number, "float": float(number), "Sequence[str]": [text, text], "bool": True}
    arguments = []
    for parameter in list(inspect.signature(kind.__init__).parameters.values())[1:]:
        annotation = str(getattr(parameter.annotation, "__name__", parameter.annotation)).split(" | ")[0]
        arguments.append(values[annotation if annotation in values else "Sequence[str]"])
    return kind(*arguments)


def test_every_class_is_tried() -> None:
    assert len(CLASSES) >= 15
    assert "hello" in made(errors.UnknownModel, "hello", 1).message
    assert made(errors.InvalidRequest, "hello", 1).param == "hello"


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
@given(parts=pieces, number=st.integers(-(2**70), 2**70))
def test_no_body_is_long_or_tells_of_the_inside(kind: type[RequestError], parts: list[str], number: int) -> None:
    body = error_body(made(kind, "".join(parts), number))
    assert len(body) <= 4096
    told = json.loads(body)["error"]
    assert set(told) == {"message", "type", "param", "code"} and told["code"] == kind.status
    for leak in (" at 0x", "Traceback (", ".py", ".rs:"):
        assert leak not in told["message"].replace("...", "")


@pytest.mark.parametrize("text", ["\x00", "\U0001f98a", '"', "\ud800", "/a", " at 0x", "Traceback ("])
def test_long_texts(text: str) -> None:
    text *= 10**6
    for kind in CLASSES:
        assert len(error_body(made(kind, text, 1))) <= 4096


def test_plain_words_stay_as_they_are() -> None:
    message = "The value 'a/b' of `x` must be from 0 to 5, got 0x12; see docs/a.md."
    assert json.loads(error_body(errors.InvalidRequest(message, "x")))["error"]["message"] == message
    assert error_response(errors.ServerOverloaded(7)).headers["retry-after"] == "7"
