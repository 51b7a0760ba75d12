"""One record, one line: nothing that a client wrote looks like a record of its own."""

import io
import json
import logging
import sys
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from scripted_engine import Live, make_tokenizer

from minivllm.config import make_config
from minivllm.logs import JsonLines, TextLines, set_up_logging

FORGED = "2030-01-01 00:00:00,000 ERROR the disk is full"
HOSTILE = [
    f"x\r\n{FORGED}", f"x\n{FORGED}", f"x\r{FORGED}", f"\x1b[2J\x1b[31m{FORGED}", "a\x00b", f"x\u2028{FORGED}",
    f"x\u2029{FORGED}", f"x\x85{FORGED}", f"x\x0b{FORGED}\x0c", "\x9b31m", "\u202egnp.exe", "\ud800", "\x7f\x08",
    "x" * 10**6, "%s %d %(name)s", "{}",
]  # fmt: skip


def record(message: str, *args: object, error: BaseException | None = None) -> logging.LogRecord:
    info = None if error is None else (type(error), error, error.__traceback__)
    return logging.LogRecord("minivllm.x", logging.ERROR, __file__, 1, message, args, info)


def raised(text: str) -> ValueError:
    try:
        raise ValueError(text)
    except ValueError as error:
        return error


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: ascii(t[:12]))
def test_one_record_is_one_line(text: str) -> None:
    for made in (record(text), record("got %s", text), record("it broke", error=raised(text))):
        line = TextLines("server").format(made)
        assert len(line.splitlines()) == 1 and line.isprintable() and line.encode()
        line = JsonLines("server").format(made)
        assert len(line.splitlines()) == 1 and line.isascii() and line.isprintable()
        fields = json.loads(line)
        assert set(fields) == {"time", "level", "part", "logger", "message", *(["exception"] if made.exc_info else [])}
        assert fields["level"] == "ERROR"


def test_what_a_line_says() -> None:
    line = TextLines("engine").format(record("it broke\nhere: %d", 5, error=raised("no\nway")))
    assert " ERROR engine: it broke\\nhere: 5\\nTraceback" in line and line.endswith("ValueError: no\\nway")
    assert " ERROR ready" in TextLines("server").format(record("ready"))
    fields = json.loads(JsonLines("engine").format(record("it broke\nhere: %d", 5, error=raised("no\nway"))))
    assert (fields["message"], fields["part"]) == ("it broke\nhere: 5", "engine")
    assert fields["exception"].endswith("ValueError: no\nway\n")


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Logging as the command sets it up, into a string."""
    root = logging.getLogger()
    kept, level, stream = root.handlers[:], root.level, io.StringIO()

    def begin(form: Any) -> io.StringIO:
        root.handlers[:] = []
        monkeypatch.setattr(sys, "stderr", stream)
        set_up_logging("debug", form, "server")
        return stream

    yield begin
    root.handlers[:] = kept
    root.setLevel(level)


@pytest.mark.parametrize("form", ["text", "json"])
def test_nobody_writes_into_the_log_of_a_server(
    lines: Callable[[str], io.StringIO], tmp_path: Any, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Paths, headers, prompts and names with all of it, on a server that logs as much as it can and breaks on the way."""
    stream = lines(form)
    live = Live(make_tokenizer(tmp_path), make_config(port=0, access_log=True, log_level="debug")).start()
    try:
        texts = [t for t in HOSTILE[:-4] if "\ud800" not in t]
        with httpx.Client(base_url=live.url, timeout=20) as client:
            for text in texts:
                quoted = "".join(f"%{byte:02x}" for byte in text.encode())
                client.get(f"/{quoted}?{quoted}", headers={"x-odd": "a\tb"})
                client.post("/generate", json={"prompt": text + " secret-words", "max_tokens": 1})
                client.post("/v1/completions", json={"prompt": "x", "model": text, text: 1})
            monkeypatch.setattr(live.llm, "open", lambda *_: (_ for _ in ()).throw(RuntimeError("broken by\n" + FORGED)))
            for _ in range(2):
                client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, "stream": True})
    finally:
        live.end()
    assert live.exit_code == 0
    written = [line for line in stream.getvalue().split("\n") if line]
    assert len(written) > len(texts)
    assert not [line for line in written if line.startswith(FORGED[:10]) or not line.isprintable()]
    assert "secret-words" not in stream.getvalue()
    assert any("broken by" in line and "Traceback" in line for line in written)
    if form == "json":
        assert all(set(json.loads(line)) >= {"time", "level", "logger", "message"} for line in written)
