"""An engine that says what the test wrote, for tests of the server; as a program, a whole server on it (real signals)."""

import argparse
import asyncio
import json
import logging
import math
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import uvloop
from fastapi import FastAPI
from tokenizers import decoders, models, pre_tokenizers, trainers

from minivllm.async_llm import AsyncLLM
from minivllm.config import Config, make_config
from minivllm.errors import EngineDead
from minivllm.observe.metrics import metrics_for
from minivllm.records import EngineOutput, FinishedTimes, RowRecord, StepRecord
from minivllm.server.application import create_app
from minivllm.server.http import Server, serve
from minivllm.text.tokenizer import Tokenizer, load_tokenizer
from minivllm.types import EngineHealth, EngineInfo, GenerateRequest, TokenEvent, TokenLogprobs

STORY = " Once upon a time, a small fox met a big bear."
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(folder: Path) -> Tokenizer:
    """A byte-level tokenizer trained on a few lines, so that every text can be said in it."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([STORY, "Tell me a story about a fox."] * 10, trainer)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": CHAT_TEMPLATE}))
    return load_tokenizer(folder)


@dataclass
class _Open:
    request: GenerateRequest
    sent: int = 0


class ScriptedClient:
    """An ``EngineClient`` whose every answer is ``text``, one token a step, over again until ``max_tokens``.

    With ``ends`` the answer stops with the text. ``hold`` keeps everything waiting; ``failing`` fails each request at its
    third token; ``die`` is the end of the engine. Tests write these fields; the server's loop does the rest.
    """

    def __init__(self, tokenizer: Tokenizer, max_model_len: int = 512, delay_s: float = 0.0) -> None:
        self.health = EngineHealth(up=True)
        self.info = EngineInfo(max_model_len, 8, 256, 16, 100, tokenizer.vocab_size, (0,), "test", "none", 0, 0, 0)
        self.tokenizer = tokenizer
        self.text = STORY
        self.ends = False
        self.hold = False
        self.failing = False
        self.dead = False
        self.delay_s = delay_s
        self.added: list[GenerateRequest] = []
        self.aborted: list[str] = []
        self.paused: list[str] = []
        self.resumed: list[str] = []
        self._open: dict[str, _Open] = {}
        self._step = 0
        self._wake = asyncio.Event()

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def num_sent(self) -> list[int]:
        """Tokens of each request that runs."""
        return [o.sent for o in self._open.values()]

    def add(self, request: GenerateRequest) -> None:
        self.added.append(request)
        self._open[request.id] = _Open(request)
        self._wake.set()

    def abort(self, ids: Sequence[str]) -> None:
        for name in ids:
            self.aborted.append(name)
            self._open.pop(name, None)

    def pause(self, ids: Sequence[str]) -> None:
        self.paused += ids

    def resume(self, ids: Sequence[str]) -> None:
        self.resumed += ids
        self._wake.set()

    async def close(self) -> None:
        self.dead = True
        self._wake.set()

    async def outputs(self) -> EngineOutput:
        while True:
            self._wake.clear()
            await asyncio.sleep(self.delay_s)
            if self.dead:
                raise EngineDead
            if self._open and not self.hold:
                return self._say()  # at times nothing: all that is open is paused
            waited = asyncio.create_task(self._wake.wait())
            await asyncio.wait({waited}, timeout=0.02)  # tests change the fields from another thread
            waited.cancel()

    def _say(self) -> EngineOutput:
        """One step: the next token of every request."""
        self._step += 1
        script = self.tokenizer.encode(self.text)
        events, finished, now = [], [], time.monotonic()
        stopped = {name for name in self.paused if self.paused.count(name) > self.resumed.count(name)}
        able = {name: o for name, o in self._open.items() if name not in stopped}
        rows = tuple(RowRecord(name, o.sent, 1, "decode") for name, o in able.items())
        for name, o in able.items():
            token = script[o.sent % len(script)]
            o.sent += 1
            limit = o.request.sampling.max_tokens or 1
            reason = "length" if o.sent >= limit else "stop" if self.ends and o.sent > len(script) else None
            if reason == "stop":
                token = 0
            if self.failing and o.sent >= 3:
                events.append(TokenEvent(name, (), "error", error="The scripted engine was told to fail."))
            else:
                count = o.request.sampling.logprobs
                told = () if count is None else (TokenLogprobs(-0.5, 1, *scripted_top(count)),)
                events.append(TokenEvent(name, (token,), reason, logprobs=told))
            if events[-1].finish_reason is not None:
                del self._open[name]
                times = (o.request.arrival_s, o.request.arrival_s, o.request.arrival_s + 0.01, now)
                finished.append(
                    FinishedTimes(name, events[-1].finish_reason, len(o.request.prompt_ids), 0, o.sent, limit, 0, *times)
                )
        waits = len(self._open)
        record = StepRecord(
            self._step, now, now, now, now, rows, waits, 0, (), "", 100, 100 - waits, 0, waits, 0, 0, 0, len(rows),
            (), tuple(0.01 for _ in rows), tuple(finished),
        )  # fmt: skip
        return EngineOutput(tuple(events), record)


def scripted_top(count: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Ids and logprobs of the likeliest tokens at every position. The last is ruled out."""
    return tuple(range(40, 40 + count)), tuple([-1.0 - i for i in range(count - 1)] + [-math.inf] * (count > 0))


class Live:
    """A real server on a scripted engine, in a thread of its own."""

    def __init__(self, tokenizer: Tokenizer, config: Config, delay_s: float = 0.0, context: int = 512) -> None:
        self.tokenizer = tokenizer
        self.context = context
        self.config = config
        self.delay_s = delay_s
        self.client: ScriptedClient
        self.llm: AsyncLLM
        self.app: FastAPI
        self.server: Server
        self.exit_code: int | None = None
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._main())

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.client = ScriptedClient(self.tokenizer, self.context, self.delay_s)
        self.llm = AsyncLLM(self.client, self.tokenizer, self.config, metrics_for(self.config, self.client.info))
        self.app = create_app(self.llm, self.config)
        self.exit_code = await serve(self.app, self.config, self.llm, self._is_ready)
        self.llm.helpers.close()

    def _is_ready(self, server: Server) -> None:
        self.server = server
        self.url = server.url
        self.port = server.port
        self._ready.set()

    def start(self) -> "Live":
        self._thread.start()
        if not self._ready.wait(20):
            raise RuntimeError("the server did not start")
        return self

    def stop(self) -> None:
        """As a signal would; twice is now."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self.server.stop)

    def join(self, timeout_s: float = 20) -> int | None:
        """Wait for the end; the exit code."""
        self._thread.join(timeout_s)
        return self.exit_code

    def end(self) -> None:
        self.stop()
        self.stop()
        self.join()


def main() -> int:
    """``python scripted_engine.py FOLDER OPTIONS-JSON``: serve until a signal; prints the port, exits with serve's code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("options", type=json.loads)
    arguments = parser.parse_args()
    logging.basicConfig(level="INFO")
    config = make_config(port=0, served_model_name=("fox",), **arguments.options)

    async def run() -> int:
        client = ScriptedClient(load_tokenizer(arguments.folder), delay_s=0.05)
        llm = AsyncLLM(client, client.tokenizer, config, metrics_for(config, client.info))
        return await serve(create_app(llm, config), config, llm, lambda server: print(server.port, flush=True))

    return asyncio.run(run())


if __name__ == "__main__":
    sys.exit(main())
