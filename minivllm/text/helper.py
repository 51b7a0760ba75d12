"""Strangers' programs, run where they can do no harm: a child process with limits of time and memory.

A chat template is a program that came with a model, and a grammar is one that a client sent; no check can say beforehand how
long either takes (``(a{1000}){1000}`` is short). So the server lets a child render and try them. One that takes too long is
killed with its child, one that needs too much memory dies with it; its request is refused, and the next one gets a new child.
Work waits its turn in the order in which it came, so templates and grammars have a child each: a slow grammar holds up other
grammars and nothing else.
"""

import asyncio
import contextlib
import subprocess
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

import msgspec

from minivllm.child import READ_BYTES, FrameReader, encode, start_child
from minivllm.errors import GenerationFailed, InvalidRequest
from minivllm.text.tokenizer import Tokenizer
from minivllm.types import EngineInfo, Grammar

PROGRAM: Final = ("-m", "minivllm.text.helper_process")
START_S = 60.0  # a child that has not begun by then will not: the machine is out of something
MIB: Final = 2**20
MOST_KNOWN: Final = 4096  # grammars that were found good and need not be tried again


class Template(msgspec.Struct, frozen=True, tag="template"):
    """What a child needs to render chats."""

    source: str
    special_tokens: dict[str, str]


class Words(msgspec.Struct, frozen=True, tag="words"):
    """What a child needs to try grammars: a vocabulary."""

    tokenizer: str  # as in a tokenizer.json
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """First word to a child."""

    setup: Template | Words
    memory_bytes: int  # what jobs may take beside what the child has when it is ready


class Render(msgspec.Struct, frozen=True, tag="render"):
    """A chat to be rendered; the fields are those of ``ChatTemplate.render``."""

    messages: list[dict[str, Any]]
    add_generation_prompt: bool
    continue_final_message: bool
    values: dict[str, Any]


class Try(msgspec.Struct, frozen=True, tag="try"):
    """A grammar to be made, to see whether it can be followed."""

    grammar: Grammar


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The child is ready, or a job is done; ``text`` is what was rendered."""

    text: str = ""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The job cannot be done, as an ``InvalidRequest`` says it."""

    message: str
    param: str | None


ToHelper = Begin | Render | Try
FromHelper = Done | Refused


@dataclass(frozen=True)
class Duty:
    """What a helper is for, and within what."""

    setup: Template | Words
    time_s: float
    memory_bytes: int
    what: str  # it does, as a sentence's subject
    remedy: str
    param: str


def templates(setup: Template) -> Duty:
    """Rendering chats."""
    return Duty(setup, 2.0, 256 * MIB, "The chat template", "send fewer or shorter messages", "messages")


def grammars(setup: Words) -> Duty:
    """Trying grammars."""
    return Duty(setup, 5.0, 512 * MIB, "Preparing the grammar", "simplify it", "structured_outputs")


class _Child:
    """A running child. Written by its ``Helper``."""

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.process = process
        self.writer = writer
        self._reader = reader
        self._frames = FrameReader(FromHelper)  # type: ignore[arg-type]

    async def ask(self, message: msgspec.Struct, within_s: float) -> object:
        """Send a message and wait for the answer. Raises ``EOFError`` when the child ended, ``TimeoutError``."""
        self.writer.write(encode(message))
        async with asyncio.timeout(within_s):
            while True:
                try:
                    data = await self._reader.read(READ_BYTES)
                except ConnectionResetError:
                    data = b""
                if not data:
                    raise EOFError
                if answers := self._frames.feed(data):
                    return answers[0]


class Helper:
    """One child at a time, started when it is first needed. Written by the server's event loop."""

    def __init__(self, duty: Duty) -> None:
        self._duty = duty
        self._turn = asyncio.Lock()
        self._child: _Child | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def pid(self) -> int | None:
        """The running child's process id."""
        return None if self._child is None else self._child.process.pid

    def begin(self) -> None:
        """Start the child now, so that the first job need not wait for it."""
        self._keep(asyncio.ensure_future(self._begun()))

    async def do(self, job: Render | Try) -> str:
        """What a job gives. Raises ``InvalidRequest`` for one that is refused or goes beyond the limits."""
        task = asyncio.ensure_future(self._in_turn(job))  # goes on when its client goes, so that no answer is left over
        self._keep(task)
        return await asyncio.shield(task)

    def _keep(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # there may be nobody to see it

    async def _begun(self) -> None:
        async with self._turn:
            self._child = self._child or await self._start()

    async def _in_turn(self, job: Render | Try) -> str:
        duty = self._duty
        async with self._turn:
            if self._child is None or self._child.process.poll() is not None:
                self._child = await self._start()
            try:
                answer = await self._child.ask(job, duty.time_s)
            except TimeoutError:
                self._end()
                raise InvalidRequest(f"{duty.what} took longer than {duty.time_s:g} s; {duty.remedy}.", duty.param) from None
            except (EOFError, ConnectionError):
                self._end()
                problem = f"{duty.what} took more than {duty.memory_bytes // MIB} MiB of memory; {duty.remedy}."
                raise InvalidRequest(problem, duty.param) from None
            except ValueError:  # larger than a frame
                raise InvalidRequest(f"The request is too large; {duty.remedy}.", duty.param) from None
        if isinstance(answer, Refused):
            raise InvalidRequest(answer.message, answer.param)
        return answer.text if isinstance(answer, Done) else ""

    async def _start(self) -> _Child:
        """A child that is ready. Raises ``GenerationFailed``."""
        child = _Child(*await start_child(PROGRAM))
        try:
            await child.ask(Begin(self._duty.setup, self._duty.memory_bytes), START_S)
        except (EOFError, TimeoutError, ConnectionError):
            child.process.kill()
            raise GenerationFailed("The server could not start a helper process; try it again.") from None
        return child

    def _end(self) -> None:
        """Let the child go, at once."""
        child, self._child = self._child, None
        if child is not None:
            child.writer.close()
            child.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(1.0)

    def close(self) -> None:
        """End the child, if there is one."""
        self._end()


class Helpers:
    """A server's helpers, and which grammars were found good. Written by the server's event loop."""

    def __init__(self, tokenizer: Tokenizer, info: EngineInfo) -> None:
        self._tokenizer = tokenizer
        self._info = info
        self._templates: Helper | None = None
        self._grammars: Helper | None = None
        self._good: OrderedDict[bytes, None] = OrderedDict()  # digests, the latest used last

    @property
    def pids(self) -> list[int]:
        """The children that run."""
        return [helper.pid for helper in (self._templates, self._grammars) if helper is not None and helper.pid is not None]

    def begin(self) -> None:
        """Start what most servers will need."""
        if self._tokenizer.has_chat_template:
            self._renderer().begin()

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **values: Any,
    ) -> str:
        """The prompt text of a chat; see ``Tokenizer.render_chat``. Raises ``InvalidRequest``."""
        chat = [dict(message) for message in messages]
        return await self._renderer().do(Render(chat, add_generation_prompt, continue_final_message, values))

    def _renderer(self) -> Helper:
        """Who renders. Raises ``InvalidRequest`` when the model has no template."""
        template = self._tokenizer.template()
        if self._templates is None:
            self._templates = Helper(templates(Template(template.source, template.special_tokens)))
        return self._templates

    async def check(self, grammar: Grammar) -> None:
        """See whether the engine can follow a grammar, within the limits. Raises ``InvalidRequest``."""
        plain = Grammar(grammar.kind, grammar.source, grammar.compact)
        digest = sha256(msgspec.msgpack.encode(plain)).digest()
        if digest in self._good:
            self._good.move_to_end(digest)
            return
        if self._grammars is None:
            size = max(self._info.vocab_size, self._tokenizer.vocab_size)
            self._grammars = Helper(grammars(Words(self._tokenizer.as_json(), size, self._ends())))
        await self._grammars.do(Try(plain))
        self._good[digest] = None
        if len(self._good) > MOST_KNOWN:
            self._good.popitem(last=False)

    def _ends(self) -> tuple[int, ...]:
        return self._tokenizer.known_ids(self._info.eos_token_ids)

    def close(self) -> None:
        """End the children."""
        for helper in (self._templates, self._grammars):
            if helper is not None:
                helper.close()
