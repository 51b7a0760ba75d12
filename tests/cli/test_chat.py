"""``chat``: the conversation it keeps, its commands, and what an error or Ctrl-C does to it."""

import asyncio
import io
from collections.abc import AsyncGenerator, Callable, Sequence

import pytest

from minivllm.cli.chat import Chat, run
from minivllm.errors import EngineDead, InvalidOption, InvalidRequest


class Parrot:
    """Answers with what was said last, in pieces. Written by ``answer``: what it was shown."""

    def __init__(self) -> None:
        self.seen: list[list[dict[str, str]]] = []

    async def answer(self, messages: Sequence[dict[str, str]]) -> AsyncGenerator[str, None]:
        self.seen.append([dict(m) for m in messages])
        text = messages[-1]["content"]
        if text == "too long":
            raise InvalidRequest("The conversation is too long; begin a new one.")
        if text == "die":
            raise EngineDead
        for word in text.split():
            yield word + " "
            await asyncio.sleep(0)

    async def close(self) -> None:
        """Nothing to close."""


Talk = Callable[[str], tuple[int, Parrot]]


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Run a piped conversation."""

    def run(text: str, system: tuple[str, ...] = ()) -> tuple[int, Parrot]:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        parrot = Parrot()
        with asyncio.Runner() as runner:
            return Chat(runner, parrot, [{"role": "system", "content": s} for s in system]).run(), parrot

    return run


def roles(messages: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in messages]


def test_answers_stream_and_the_conversation_grows(talk: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    code, parrot = talk("hello there\nand again\n")
    assert code == 0
    assert capsys.readouterr().out == "hello there \nand again \n"
    assert roles(parrot.seen[1]) == [("user", "hello there"), ("assistant", "hello there "), ("user", "and again")]


def test_reset_forgets_all_but_the_system_message(talk: Talk) -> None:
    _, parrot = talk("one\n/reset\ntwo\n", system=("be kind",))  # type: ignore[call-arg]
    assert roles(parrot.seen[1]) == [("system", "be kind"), ("user", "two")]


def test_exit_leaves_and_blank_lines_say_nothing(talk: Talk) -> None:
    code, parrot = talk("\n  \none\n/exit\ntwo\n")
    assert code == 0
    assert len(parrot.seen) == 1


def test_a_backslash_continues_the_message(talk: Talk) -> None:
    _, parrot = talk("one \\\ntwo\n")
    assert parrot.seen[0][-1]["content"] == "one \ntwo"


def test_help_and_unknown_commands_are_not_messages(talk: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    _, parrot = talk("/help\n/nonsense\n/ a path\n")
    assert [seen[-1]["content"] for seen in parrot.seen] == ["/ a path"]
    assert "/reset" in capsys.readouterr().out


def test_a_refused_message_is_forgotten_and_told(talk: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    code, parrot = talk("too long\nshort\n")
    assert code == 1
    assert roles(parrot.seen[1]) == [("user", "short")]
    assert capsys.readouterr().err == "The conversation is too long; begin a new one.\n"


def test_a_dead_engine_ends_the_chat(talk: Talk) -> None:
    with pytest.raises(EngineDead):
        talk("die\nmore\n")


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal. The answer raises what ``asyncio.Runner`` raises when Ctrl-C cancels it."""

    class Interrupted(Parrot):
        async def answer(self, messages: Sequence[dict[str, str]]) -> AsyncGenerator[str, None]:
            self.seen.append([dict(m) for m in messages])
            yield "so far "
            if len(self.seen) == 1:
                raise KeyboardInterrupt

    lines = iter(["first", "second"])

    def typed(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    parrot = Interrupted()
    with asyncio.Runner() as runner:
        chat = Chat(runner, parrot, [])
        chat._is_terminal = True
        assert chat.run() == 0
    assert roles(parrot.seen[1]) == [("user", "first"), ("assistant", "so far "), ("user", "second")]
    assert "(stopped)" in capsys.readouterr().out


def test_options_of_the_engine_are_refused_for_a_running_server() -> None:
    with pytest.raises(InvalidOption, match=r"--dtype .* --url"):
        run(["--url", "http://127.0.0.1:1", "--dtype", "float32"])
