"""``mini-vllm chat``: a conversation in the terminal, streamed as it comes.

The model runs in an engine process of its own, or on a server (``--url``). Ctrl-C stops the answer, not the program. Piped
input works too: each line is a message, and nothing but answers is written.
"""

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Final, Protocol

from minivllm.cli.options import Parser, add_config, add_model_argument, add_sampling, as_json, read_config, read_sampling
from minivllm.config import options
from minivllm.errors import EngineDead, InvalidOption, MiniVLLMError

HELP: Final = """/reset  forget the conversation and begin a new one
/help   this page
/exit   leave (so does Ctrl-D)
Ctrl-C stops an answer. A line that ends in \\ goes on in the next."""


class Backend(Protocol):
    """Where answers come from."""

    def answer(self, messages: Sequence[dict[str, str]]) -> AsyncGenerator[str, None]:
        """Stream the text of the next message. Raises ``MiniVLLMError``."""

    async def close(self) -> None:
        """Let it go."""


class LocalBackend:
    """A model in an engine process that this command starts. Written by the chat's event loop."""

    def __init__(self, config: Any, sampling: Any) -> None:
        self._config = config
        self._sampling = sampling
        self._num_answers = 0

    async def start(self) -> None:
        """Load the model. Raises ``StartupError``."""
        from minivllm.cli.start import start_llm
        from minivllm.door import locate

        config, folder = locate(self._config)
        self._llm = await start_llm(config, folder)
        self._pump = asyncio.create_task(self._llm.run())
        if not self._llm.tokenizer.has_chat_template:
            await self.close()
            raise InvalidOption("This model has no chat template; give one with --chat-template, or use `mini-vllm generate`.")

    async def answer(self, messages: Sequence[dict[str, str]]) -> AsyncGenerator[str, None]:
        """See ``Backend``."""
        tokenizer = self._llm.tokenizer
        ids = tokenizer.encode(tokenizer.render_chat(list(messages)), add_special_tokens=False)
        self._num_answers += 1
        generator: Any = self._llm.generate(f"chat-{self._num_answers}", ids, self._sampling)
        async with aclosing(generator) as outputs:
            async for output in outputs:
                yield output.text

    async def close(self) -> None:
        """Stop the engine process."""
        self._pump.cancel()
        await asyncio.wait({self._pump})
        await self._llm.close()


class RemoteBackend:
    """A running OpenAI-compatible server. Never changes."""

    def __init__(self, url: str, model: str | None, fields: dict[str, Any]) -> None:
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
        self._fields = fields if model is None else {**fields, "model": model}

    async def answer(self, messages: Sequence[dict[str, str]]) -> AsyncGenerator[str, None]:
        """See ``Backend``."""
        from minivllm.bench.client import RequestFailed, stream_events

        body = {"messages": list(messages), "stream": True, **self._fields}
        async with aclosing(stream_events(self._url, body)) as events:
            async for event in events:
                if event == "[DONE]":
                    return
                chunk = json.loads(event)
                if "error" in chunk:
                    raise RequestFailed(chunk["error"].get("message", "the server could not finish the answer"))
                for choice in chunk.get("choices", ()):
                    yield choice["delta"].get("content") or ""

    async def close(self) -> None:
        """Nothing is open between answers."""


def run(argv: Sequence[str]) -> int:
    """Talk until the input ends."""
    parser = Parser("chat", "Talk to a model in the terminal.", "[MODEL] [options]")
    add_model_argument(parser)
    parser.add_argument("--url", help="talk to a running server, such as http://127.0.0.1:8000, instead")
    parser.add_argument("--system", metavar="TEXT", help="a system message that every conversation begins with")
    add_sampling(parser, leave_out=frozenset({"seed", "n", "logprobs"}))
    add_config(parser)
    found = parser.read(argv)
    name = found.model_name if found.model_name is not None else vars(found).get("model")
    system = [] if found.system is None else [{"role": "system", "content": found.system}]
    if found.url is not None and (own := [o.flag for o in options() if o.name != "model" and o.name in vars(found)]):
        raise InvalidOption(f"{own[0]} is settled by the server at --url; leave it out here and give it there.")
    with asyncio.Runner() as runner:
        if found.url is not None:
            backend: Backend = RemoteBackend(found.url, name, as_json(read_sampling(found)))
        else:
            backend = runner.run(_start_local(found))
        try:
            return Chat(runner, backend, system).run()
        finally:
            runner.run(backend.close())


async def _start_local(found: Any) -> LocalBackend:
    """Load the model that the options name."""
    import msgspec

    from minivllm.types import SamplingParams

    backend = LocalBackend(read_config(found), msgspec.convert(read_sampling(found), SamplingParams))
    await backend.start()
    return backend


class Chat:
    """A conversation. Written by ``run``: the messages so far."""

    def __init__(self, runner: asyncio.Runner, backend: Backend, system: list[dict[str, str]]) -> None:
        self._runner = runner
        self._backend = backend
        self._system = system
        self._messages = list(system)
        self._is_terminal = sys.stdin.isatty() and sys.stdout.isatty()

    def run(self) -> int:
        """Read messages and answer them; 1 when piped input met an error."""
        code = 0
        if self._is_terminal:
            import readline  # noqa: F401 - line editing and history for input()

            print("Type a message, or /help.")
        while (message := self._read()) is not None:
            if message in ("/exit", "/quit"):
                break
            if message == "/reset":
                self._messages = list(self._system)
                self._tell("A new conversation.")
            elif message == "/help":
                print(HELP)
            elif message.startswith("/") and message[1:].isalpha():
                self._tell(f"There is no command {message}; /help lists them.")
            elif message.strip() and not self._answer(message) and not self._is_terminal:
                code = 1
        return code

    def _read(self) -> str | None:
        """The next message; None at the end of the input."""
        lines: list[str] = []
        while True:
            try:
                line = input(("... " if lines else "> ") if self._is_terminal else "")
            except EOFError:
                return "\n".join(lines) if lines else None
            except KeyboardInterrupt:
                if not self._is_terminal:
                    raise
                print("\n/exit leaves.")
                lines.clear()
                continue
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def _answer(self, message: str) -> bool:
        """Stream the answer to ``message`` and remember both; False when there was none."""
        self._messages.append({"role": "user", "content": message})
        parts: list[str] = []
        try:
            self._runner.run(self._stream(parts))
        except KeyboardInterrupt:
            if not self._is_terminal:
                raise
            self._tell("\n(stopped)")
        except EngineDead:
            raise
        except MiniVLLMError as error:
            self._messages.pop()
            sys.stderr.write(f"{error}\n")
            return False
        print()
        self._messages.append({"role": "assistant", "content": "".join(parts)})
        return True

    async def _stream(self, parts: list[str]) -> None:
        """Write the answer as it comes."""
        async with aclosing(self._backend.answer(self._messages)) as texts:
            async for text in texts:
                parts.append(text)
                print(text, end="", flush=True)

    def _tell(self, sentence: str) -> None:
        """Say something to a person; piped output holds answers only."""
        if self._is_terminal:
            print(sentence)
