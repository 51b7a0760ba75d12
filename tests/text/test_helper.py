"""Strangers' programs in a child: what they do there reaches nobody else."""

import asyncio
import os
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from minivllm.errors import InvalidRequest
from minivllm.text.grammar import choice_grammar, json_grammar
from minivllm.text.helper import MIB, Duty, Helper, Helpers, Render, Template, Try, Words
from minivllm.text.tokenizer import Tokenizer, load_tokenizer
from minivllm.types import EngineInfo, Grammar

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tokenizer(repo: Path) -> Tokenizer:
    return load_tokenizer(repo / "minivllm" / "assets" / "stories")


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 120))


def duty(source: str, time_s: float = 60.0, memory_mib: int = 256) -> Duty:
    return Duty(Template(source, {}), time_s, memory_mib * MIB, "The template", "send less", "messages")


async def render(helper: Helper, **values: Any) -> str:
    return await helper.do(Render(CHAT, False, False, values))


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_it_renders_and_refuses_as_here() -> None:
    async def work() -> None:
        helper = Helper(duty("{% if bad %}{{ raise_exception('no ' + bad) }}{% endif %}{{ messages[0].content }}{{ x }}"))
        assert await render(helper, x="!") == "hi!"
        pid = helper.pid
        with pytest.raises(InvalidRequest, match="no words") as refused:
            await render(helper, bad="words")
        assert refused.value.param == "messages"
        assert await render(helper, x="?") == "hi?" and helper.pid == pid
        helper.close()
        assert pid is not None and gone(pid)

    run(work())


def test_what_takes_too_long_ends_with_its_child() -> None:
    source = "{% if slow %}{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}{% endif %}ok"

    async def work() -> None:
        helper = Helper(duty(source, time_s=0.5))
        await render(helper)
        first = helper.pid
        with pytest.raises(InvalidRequest, match=r"took longer than 0.5 s; send less"):
            await render(helper, slow=True)
        assert first is not None and gone(first)
        assert await render(helper) == "ok" and helper.pid != first
        helper.close()

    run(work())


def test_what_needs_too_much_memory_ends_with_its_child() -> None:
    async def work() -> None:
        helper = Helper(duty("{% if large %}{{ (messages[0].content * 3000000000) | length }}{% endif %}ok"))
        await render(helper)
        first = helper.pid
        with pytest.raises(InvalidRequest, match="more than 256 MiB of memory"):
            await render(helper, large=True)
        assert await render(helper) == "ok" and helper.pid != first
        helper.close()

    run(work())


def test_a_child_that_is_killed_is_replaced() -> None:
    async def work() -> None:
        helper = Helper(duty("ok"))
        await render(helper)
        assert helper.pid is not None
        os.kill(helper.pid, signal.SIGKILL)
        for _ in range(200):  # until the system has told that it is dead, a job may still be given to it
            try:
                assert await render(helper) == "ok"
                break
            except InvalidRequest:
                await asyncio.sleep(0.01)
        else:
            raise AssertionError("no new child came")
        helper.close()

    run(work())


def test_a_client_that_goes_does_not_shift_the_answers() -> None:
    async def work() -> None:
        helper = Helper(duty("{% for i in range(n) %}{% endfor %}{{ x }}"))
        await render(helper, n=0, x="")
        for number in range(20):
            waiting = asyncio.create_task(render(helper, n=20_000, x=f"gone {number}"))
            await asyncio.sleep(0.001)
            waiting.cancel()
            assert await render(helper, n=1, x=str(number)) == str(number)
        together = await asyncio.gather(*(render(helper, n=1, x=str(i)) for i in range(50)))
        assert together == [str(i) for i in range(50)]
        helper.close()

    run(work())


def test_grammars_are_tried_once(tokenizer: Tokenizer) -> None:
    info = EngineInfo(512, 8, 256, 16, 100, tokenizer.vocab_size, (0,), "test", "none", 0, 0, 0)

    async def work() -> None:
        helpers = Helpers(tokenizer, info)
        good = json_grammar({"type": "object"})
        await helpers.check(good)
        (pid,) = helpers.pids
        os.kill(pid, signal.SIGSTOP)  # who is known to be good needs no child
        await helpers.check(good)
        os.kill(pid, signal.SIGCONT)
        for bad in (Grammar("regex", "(a"), Grammar("lark", "start: x"), json_grammar({"type": "objekt"})):
            with pytest.raises(InvalidRequest, match="cannot be followed"):
                await helpers.check(bad)
        await helpers.check(choice_grammar(["yes", "no"]))
        assert await helpers.render(CHAT) == tokenizer.render_chat(CHAT)
        assert len(helpers.pids) == 2, "templates do not wait for grammars"
        helpers.close()
        assert helpers.pids == []

    run(work())


def test_a_grammar_beyond_the_time(tokenizer: Tokenizer) -> None:
    words = Words(tokenizer.as_json(), tokenizer.vocab_size, (0,))
    slow = {"type": "object", "patternProperties": {f"^({'|'.join('abcdefgh'[: i + 1])}){{2,40}}x{i}": {} for i in range(2000)}}

    async def work() -> None:
        helper = Helper(Duty(words, 0.02, 512 * MIB, "The grammar", "simplify it", "structured_outputs"))
        with pytest.raises(InvalidRequest, match=r"longer than 0.02 s; simplify it"):
            await helper.do(Try(json_grammar(slow)))
        helper.close()

    run(work())
