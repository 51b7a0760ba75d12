"""Faults on purpose: anything that is done for one request of a batch can be made to fail, and the whole server is watched.

``Faults`` wraps named functions of the package, so that the package knows nothing of it. Each wrapper finds out which requests
a call is about (by their seeds, which are all different) and raises when it is the chosen one's turn for the n-th time; from
then on every time (a fault of the request), or only once (an accident). ``Stage`` runs the real server on a tiny random model:
the application through ASGI, its event loop, the engine and the runner, all in this process.
"""

import asyncio
import contextlib
import importlib
import json
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from scripted_engine import make_tokenizer
from tiny_models import SMALL, randomize

from minivllm.async_llm import AsyncLLM
from minivllm.config import make_config
from minivllm.delivery import Pacer
from minivllm.engine.build import build_engine
from minivllm.engine.client import LocalClient
from minivllm.observe.metrics import metrics_for
from minivllm.server.application import create_app
from minivllm.text.helper import templates
from minivllm.text.tokenizer import load_tokenizer
from minivllm.types import SamplingParams

BATCH = 16
ERRORS: tuple[Callable[[], Exception], ...] = (
    lambda: ValueError("on purpose"), lambda: KeyError("on purpose"), lambda: AssertionError("on purpose"),
    lambda: IndexError("on purpose"), lambda: RuntimeError("on purpose"), lambda: torch.OutOfMemoryError("on purpose"),
    lambda: RecursionError("on purpose"), lambda: MemoryError("on purpose"),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- where to fail


@dataclass
class Known:
    """Which request is behind what the functions are given. Written by the wrappers."""

    of_row: dict[int, int] = field(default_factory=dict)  # seeds
    of_order: dict[str, int] = field(default_factory=dict)
    sampling: dict[int, SamplingParams] = field(default_factory=dict)  # by seed
    of_object: dict[int, int] = field(default_factory=dict)  # detokenizers, guides ..., by their id()

    def rows(self, rows: Iterable[int]) -> set[int]:
        return {self.of_row[int(row)] for row in rows if int(row) in self.of_row}

    def behind(self, *objects: object) -> set[int]:
        return {self.of_object[id(o)] for o in objects if id(o) in self.of_object}


def _marked(text: object) -> set[int]:
    """The seeds that a text names: prompts hold their request's as ``#1234#``."""
    parts = (text if isinstance(text, bytes) else str(text).encode()).split(b"#")
    return {int(part) for part in parts[1::2] if part.isdigit()}


@dataclass(frozen=True)
class Point:
    """A function that may fail, and whose turn a call is."""

    place: str
    where: str  # "module:Class.name" or "module:name"
    who: Callable[..., set[int]]  # (known, *arguments) -> seeds


def _request(known: Known, _: object, request: Any, *rest: object, **more: object) -> set[int]:
    return {request.seed}


def _of_self(known: Known, self: object, *rest: object, **more: object) -> set[int]:
    return known.behind(self)


def _asking(asks: Callable[[SamplingParams], bool]) -> Callable[..., set[int]]:
    """Of a batch, the rows that ask for a feature: without them it would not be called."""
    return lambda known, _, __, batch: {seed for seed in known.rows(batch.rows) if asks(known.sampling[seed])}


def _penalized(asked: SamplingParams) -> bool:
    return asked.repetition_penalty != 1 or asked.presence_penalty != 0 or asked.frequency_penalty != 0


def _output(known: Known, output: Any) -> set[int]:
    return {known.of_order[output.id]} if output.id in known.of_order else set()


def _new_row(known: Known, _: object, new: Any) -> set[int]:
    return {new.seed}


POINTS = (
    Point("parse", "minivllm.server.fields:Form.read", lambda k, _, body: _marked(body)),
    Point("parse", "minivllm.server.routes.completions:sampling_of", lambda k, body, **more: {body.seed}),
    Point("parse", "minivllm.server.routes.chat:sampling_of", lambda k, body, **more: {body.seed}),
    Point("parse", "minivllm.server.messages:messages_of", lambda k, messages: _marked(messages)),
    Point("render", "minivllm.text.helper:Helpers.render", lambda k, _, messages, **more: _marked(messages)),
    Point("tokenise", "minivllm.text.tokenizer:Tokenizer.encode", lambda k, _, text, *rest, **more: _marked(text)),
    Point("tokenise", "minivllm.text.tokenizer:Tokenizer.encode_chat", lambda k, _, text, *rest, **more: _marked(text)),
    Point("admit", "minivllm.async_llm:AsyncLLM._accept", lambda k, _, order, *rest: {order.sampling.seed}),
    Point("admit", "minivllm.text.outputs:OutputProcessor.add", lambda k, _, name, ids, sampling, *rest: {sampling.seed}),
    Point("admit", "minivllm.engine.client:LocalClient.add", lambda k, _, request: {request.sampling.seed}),
    Point("admit", "minivllm.engine.engine:Engine._add", lambda k, _, request: {request.sampling.seed}),
    Point("admit", "minivllm.scheduler.scheduler:Scheduler.add", lambda k, _, spec, guide=None: {spec.sampling.seed}),
    Point("admit", "minivllm.scheduler.book:Book.enter", _request),
    Point("schedule", "minivllm.scheduler.planner:Planner._try_admit", _request),
    Point("schedule", "minivllm.scheduler.planner:Planner._begin", _request),
    Point("schedule", "minivllm.scheduler.planner:Planner._plan_chunk", _request),
    Point("schedule", "minivllm.scheduler.draft:StepDraft.add", _request),
    Point("grammar advance", "minivllm.engine.guide:Guide._take", _of_self),
    Point("grammar advance", "minivllm.engine.guide:Guide.take", _of_self),
    Point("grammar advance", "minivllm.engine.guide:Guide.ahead", _of_self),
    Point("grammar advance", "minivllm.engine.guide:Guide._standing", _of_self),
    Point("grammar advance", "minivllm.engine.guide:Guide.complete", _of_self),
    Point("build inputs", "minivllm.runner.rows:Rows.take", _new_row),
    Point("build inputs", "minivllm.runner.rows:Rows._add_blocks", lambda k, _, row, ids: k.rows([row])),
    Point("build inputs", "minivllm.runner.logprobs:LogprobRows.set_row", _new_row),
    Point("build inputs", "minivllm.sampling.sampler:Sampler.set_row", _new_row),
    Point("build inputs", "minivllm.runner.runner:build_batch", lambda k, step, *rest: k.rows(step.rows)),
    Point("sample", "minivllm.sampling.sampler:Sampler.sample", lambda k, _, logits, rows, *rest: k.rows(rows)),
    Point("sample", "minivllm.sampling.gumbel:GumbelDraw.draw", lambda k, _, logits, batch, **more: k.rows(batch.rows)),
    Point("sample", "minivllm.sampling.temperature:Temperature.apply", _asking(lambda asked: asked.temperature not in (0, 1))),
    Point("penalties", "minivllm.sampling.penalties:Penalties.apply", _asking(_penalized)),
    Point("logprobs", "minivllm.runner.logprobs:LogprobRows.asking", lambda k, _, rows: k.rows(rows)),
    Point("logprobs", "minivllm.runner.logprobs:LogprobRows.of_prompts", lambda k, _, step, *rest: k.rows(step.rows)),
    Point("logprobs", "minivllm.server.logprobs:LogprobTexts.completion", lambda k, _, i, output, *rest: _output(k, output)),
    Point("logprobs", "minivllm.server.logprobs:LogprobTexts.chat", lambda k, _, output: _output(k, output)),
    Point("detokenise", "minivllm.text.detokenizer:Detokenizer.add", _of_self),
    Point("detokenise", "minivllm.text.detokenizer:Detokenizer.finish", _of_self),
    Point("stop check", "minivllm.scheduler.scheduler:Scheduler._append", _request),
    Point("stop check", "minivllm.scheduler.scheduler:Scheduler._apply_entry", lambda k, _, entry, *rest: {entry.request.seed}),
    Point("stop check", "minivllm.text.stop:StopMatcher.feed", _of_self),
    Point("stream", "minivllm.delivery:Mailbox.put", lambda k, _, output: _output(k, output)),
    Point("stream", "minivllm.server.routes.completions:_Script.piece", lambda k, _, i, output: _output(k, output)),
    Point("stream", "minivllm.server.routes.chat:_Script.piece", lambda k, _, i, output: _output(k, output)),
    Point("stream", "minivllm.server.routes.chat:Answer.message", lambda k, _, output: _output(k, output)),
)  # fmt: skip


@dataclass
class Fault:
    """What is to happen. Written by ``Faults``."""

    point: Point
    seed: int  # of the request that is hit
    nth: int  # call about it
    error: Callable[[], Exception]
    lasting: bool  # a fault of the request, not an accident
    late: bool  # the function has done its work
    calls: int = 0
    fired: int = 0
    beyond: bool = False  # it struck at a token that the engine computed beyond the end of an answer that was told

    def __str__(self) -> str:
        kind = f"{'lasting' if self.lasting else 'single'}{' late' if self.late else ''} {self.error()!r}"
        return f"{kind} in {self.point.where} at call {self.nth} about request {self.seed}"


class Faults:
    """The wrappers. A context manager: they are there inside the block."""

    def __init__(self) -> None:
        self.known = Known()
        self.counts: Counter[tuple[Point, int]] = Counter()  # calls about each request, while ``counting``
        self.fault: Fault | None = None
        self.counting = False
        self.is_open: Callable[[int], bool] = lambda seed: True  # whether a request that was opened has not had its end
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> "Faults":
        for point in POINTS:
            self._wrap(point.where, lambda call, args, more, point=point: self._through(point, call, args, more))
        remember = self._remember
        self._wrap("minivllm.runner.rows:Rows.take", lambda call, args, more: remember(call, args, more, self._row))
        self._wrap("minivllm.async_llm:AsyncLLM.open", lambda call, args, more: remember(call, args, more, self._orders))
        for where in ("minivllm.text.outputs:OutputProcessor.add", "minivllm.scheduler.scheduler:Scheduler.add"):
            self._wrap(where, lambda call, args, more: self._and_after(call, args, more))
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _wrap(self, where: str, around: Callable[[Any, Any, Any], Any]) -> None:
        module, _, path = where.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        original = getattr(owner, name)
        if asyncio.iscoroutinefunction(original):

            async def wrapper(*args: Any, **more: Any) -> Any:
                return await around(original, args, more)
        else:

            def wrapper(*args: Any, **more: Any) -> Any:
                return around(original, args, more)

        setattr(owner, name, wrapper)
        self._undo.callback(setattr, owner, name, original)

    def _through(self, point: Point, call: Any, args: Any, more: Any) -> Any:
        fault = self.fault
        if not self.counting and (fault is None or fault.point is not point):
            return call(*args, **more)
        seeds = point.who(self.known, *args, **more)
        if self.counting:
            self.counts.update((point, seed) for seed in seeds)
        if fault is None or fault.point is not point or fault.seed not in seeds:
            return call(*args, **more)
        fault.calls += 1
        if fault.calls == fault.nth or (fault.lasting and fault.calls > fault.nth):
            fault.fired += 1
            if fault.fired == 1 and point.where.split(".")[1] in ("engine", "runner", "sampling", "scheduler"):
                fault.beyond = fault.seed in self.known.of_order.values() and not self.is_open(fault.seed)
            if fault.late:
                result = call(*args, **more)
                if asyncio.iscoroutine(result):
                    result.close()
            raise fault.error()
        return call(*args, **more)

    # -- who is who ------------------------------------------------------------------------------------------------------

    def _remember(self, call: Any, args: Any, more: Any, note: Callable[..., None]) -> Any:
        note(*args)
        return call(*args, **more)

    def _row(self, rows: object, new: Any) -> None:
        self.known.of_row[new.row] = new.seed
        self.known.sampling[new.seed] = new.sampling

    def _orders(self, llm: object, orders: Sequence[Any], *rest: object) -> None:
        self.known.of_order.update({order.id: order.sampling.seed for order in orders})

    def _and_after(self, call: Any, args: Any, more: Any) -> Any:
        result = call(*args, **more)
        if hasattr(args[1], "sampling"):  # Scheduler.add(self, spec, guide)
            guide = args[2] if len(args) > 2 else None
            self.known.of_object[id(guide)] = args[1].sampling.seed
        else:  # OutputProcessor.add(self, id, prompt_ids, sampling)
            state = args[0]._open[args[1]]
            self.known.of_object[id(state.detokenizer)] = self.known.of_object[id(state.stops)] = args[3].seed
        return result

    def forget(self) -> None:
        """A batch is over."""
        self.known = Known()


# ------------------------------------------------------------------------------------------------------------ what is served


def tiny_model(folder: Path) -> Path:
    """A random model with a tokenizer, as small as it can be."""
    tokenizer = make_tokenizer(folder)
    sizes = {
        "vocab_size": tokenizer.vocab_size, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, **sizes}))
    randomize(model, 7)
    model.save_pretrained(folder)
    return folder


def requests_of(template: int) -> list[tuple[str, dict[str, Any]]]:
    """The sixteen requests of a batch, each of another kind: path and body. Their seeds are all different."""
    rng = random.Random(template)
    kinds: tuple[Mapping[str, Any], ...] = (
        {"temperature": 0},
        {"temperature": 1.0, "stream": True},
        {"temperature": 0.8, "presence_penalty": 0.7, "frequency_penalty": 0.4},
        {"temperature": 0, "repetition_penalty": 1.3, "stream": True},
        {"temperature": 1.0, "logprobs": 3},
        {"temperature": 0, "logprobs": 2, "stream": True},
        {"temperature": 1.0, "prompt_logprobs": 2, "logprobs": 1},
        {"temperature": 1.0, "stop": ["e", "the"], "stream": True},
        {"temperature": 1.0, "stop": ["ox", "a b"], "min_tokens": 1},
        {"temperature": 1.0, "structured_outputs": {"regex": "[a-f]{3,9}-fox-[0-9]{2,4}"}},
        {"temperature": 1.0, "structured_outputs": {"choice": ["a small fox", "a big bear"]}, "stream": True},
        {"temperature": 1.0, "n": 2},
        {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "bad_words": ["fox"], "stream": True},
        {"chat": True, "temperature": 1.0},
        {"chat": True, "temperature": 0.7, "stream": True, "logprobs": True, "top_logprobs": 2},
        {"chat": True, "temperature": 1.0, "n": 2, "stream": True, "frequency_penalty": 0.5},
    )
    told = []
    for i, kind in enumerate(kinds):
        seed = 1000 + 100 * template + i
        words = " ".join(rng.choice(("fox", "bear", "story", "time", "big", "small")) for _ in range(rng.randint(1, 12)))
        text = f"#{seed}# Tell me a story about a {words}" if rng.random() < 0.7 else f"Once upon a time, {words} #{seed}#"
        body = {"seed": seed, "max_tokens": rng.randint(2, 6), **kind}
        if body.pop("chat", False):
            told.append(("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **body}))
        else:
            told.append(("/v1/completions", {"prompt": text, **body}))
    return told


@dataclass(frozen=True)
class Answer:
    """What a client was told, however it was cut into pieces."""

    status: int
    errors: tuple[str, ...]  # messages
    told: str  # everything else, in one form

    @property
    def failed_clearly(self) -> bool:
        return len(self.errors) == 1 and bool(self.errors[0])


COLUMNS = ("tokens", "token_logprobs", "top_logprobs")  # of a completion's logprobs


async def post(app: Any, path: str, body: Mapping[str, Any]) -> tuple[int, str, str]:
    """Status, content type and text of a reply, by ASGI alone: a client's library takes longer than the server does."""
    sent: list[Any] = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    got: list[Any] = []
    over = asyncio.Event()

    async def receive() -> Any:
        if not sent:
            await over.wait()
            return {"type": "http.disconnect"}
        return sent.pop()

    async def send(message: Any) -> None:
        got.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http", "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
    }  # fmt: skip
    with contextlib.suppress(Exception):  # what the server raises again for its log, after it has answered
        await app(scope, receive, send)
    over.set()
    begun, *parts = got
    kind = dict(begun["headers"])[b"content-type"].decode()
    return begun["status"], kind, b"".join(part["body"] for part in parts).decode()


def read(reply: tuple[int, str, str]) -> Answer:
    """Understand a reply. Raises for what no client could understand."""
    status, kind, text = reply
    if kind.startswith("text/event-stream"):
        lines = [line for line in text.split("\n") if line]
        if lines[-1] != "data: [DONE]" or any(not line.startswith("data: ") for line in lines):
            raise ValueError("the stream is broken off")
        chunks = [json.loads(line[len("data: ") :]) for line in lines[:-1]]
    else:
        chunks = [json.loads(text)]
    errors = tuple(chunk["error"]["message"] for chunk in chunks if "error" in chunk)
    if errors and "error" not in chunks[-1]:
        raise ValueError("something follows the error")
    if status != 200 and not (errors and len(chunks) == 1):
        raise ValueError(f"status {status} without an error")
    told: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk.get("choices", ()):
            mine = told.setdefault(choice["index"], {"text": "", "logprobs": [], "rest": []})
            piece = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
            mine["text"] += piece.get("content") or ""
            found = choice.get("logprobs") or {}
            mine["logprobs"] += found.get("content") or ()
            mine["logprobs"] += zip(*(found.get(k) or () for k in COLUMNS), strict=True)
            mine["rest"] += [choice[k] for k in ("finish_reason", "stop_reason", "prompt_logprobs") if choice.get(k)]
    usage = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    return Answer(status, errors, json.dumps([sorted(told.items()), usage]))


class Stage:
    """A server on the tiny model, in this process. Made by ``staged``."""

    def __init__(self, engine: Any, llm: AsyncLLM, app: Any, run: "asyncio.Task[None]") -> None:
        self.engine, self.llm, self.app, self.run = engine, llm, app, run

    async def batch(self, template: int) -> list[Answer]:
        """Send the requests of a batch all at once."""
        replies = await asyncio.gather(*(post(self.app, path, body) for path, body in requests_of(template)))
        return [read(reply) for reply in replies]

    async def problems(self) -> list[str]:
        """What is wrong between batches: nothing may be left of one."""
        for _ in range(200):
            if not self.engine.has_work and not self.llm._client._inbox:  # type: ignore[attr-defined]
                break
            await asyncio.sleep(0.005)
        scheduler, found = self.engine._scheduler, []
        if self.run.done() or not self.llm.alive:
            found.append("the engine is dead")
        if self.engine.has_work:
            found.append("requests are left in the engine")
        if scheduler._kv.counts().referenced or self.llm.num_open or len(self.llm._outputs) or self.llm._held:
            found.append("blocks, mailboxes or texts are left")
        try:
            scheduler.check()
        except RuntimeError as error:
            found.append(str(error))
        scheduler._room.restore()  # it would take some hundred steps
        return found


@contextlib.asynccontextmanager
async def staged(folder: Path, **options: Any) -> AsyncIterator[Stage]:
    """A server, ready."""
    small = {
        "device": "cpu", "dtype": "float32", "num_threads": 1, "batch_invariant": True, "max_num_seqs": BATCH + 4,
        "max_model_len": 128, "max_num_batched_tokens": 256, "num_gpu_blocks_override": 160, "max_logprobs": 5,
    }  # fmt: skip
    config = make_config(model=str(folder), **{**small, **options})
    stack = contextlib.ExitStack()
    engine = build_engine(config)
    tokenizer = load_tokenizer(folder)
    at_once = Pacer(1e9)
    patient = patch("minivllm.text.helper.templates", lambda setup: replace(templates(setup), time_s=600.0))
    stack.enter_context(patient)  # a helper's limit of time is not what is tried here, and the machine may be busy
    llm = AsyncLLM(LocalClient(engine), tokenizer, config, metrics_for(config, engine.info), at_once)
    run = asyncio.create_task(llm.run())
    try:
        yield Stage(engine, llm, create_app(llm, config), run)
    finally:
        run.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await run
        await llm.close()
        stack.close()


# ------------------------------------------------------------------------------------------------------------------ the trial


@dataclass
class Tally:
    """What came of many faults. Written by ``inject``."""

    faults: Counter[str] = field(default_factory=Counter)  # by place
    ended: int = 0  # requests that were hit and ended with an error
    survived: int = 0  # that were hit by an accident and told what they would have been told
    missed: int = 0  # faults that never came to pass
    broken: list[str] = field(default_factory=list)


async def inject(stage: Stage, faults: Faults, count: int, seed: int, templates: int, report: Callable[[Tally], None]) -> Tally:
    """Make ``count`` faults, one in each batch, spread evenly over the places."""
    rng, tally = random.Random(seed), Tally()
    opened = stage.llm._outputs._open
    faults.is_open = lambda hit: any(state.sampling.seed == hit for state in list(opened.values()))
    expected, calls = [], []
    for template in range(templates):
        expected.append(await stage.batch(template))
        faults.counting = True
        if await stage.batch(template) != expected[-1] or any(answer.errors for answer in expected[-1]):
            raise RuntimeError(f"batch {template} is not the same twice, or fails by itself")
        faults.counting = False
        by_place: dict[str, list[tuple[Point, int, int]]] = {}
        for (point, hit), most in faults.counts.items():
            by_place.setdefault(point.place, []).append((point, hit, most))
        calls.append(by_place)
        faults.counts.clear()
        faults.forget()
    known_broken = 0
    places = sorted({point.place for point in POINTS})
    while tally.faults.total() < count:
        template, place = rng.randrange(templates), places[tally.faults.total() % len(places)]
        points = sorted({point for point, _, _ in calls[template][place]}, key=lambda point: point.where)
        point = rng.choice(points)
        hit, most = rng.choice([(hit, most) for p, hit, most in calls[template][place] if p is point])
        fault = Fault(point, hit, rng.randint(1, most), rng.choice(ERRORS), rng.random() < 0.6, rng.random() < 0.3)
        faults.fault = fault
        try:
            answers = await stage.batch(template)
        except Exception as error:
            tally.broken.append(f"{fault}: {error!r}")
            answers = expected[template]
        faults.fault = None
        faults.forget()
        problems = await stage.problems()
        if not fault.fired:
            tally.missed += 1
            continue
        tally.faults[place] += 1
        for i, (answer, wanted) in enumerate(zip(answers, expected[template], strict=True)):
            is_hit = 1000 + 100 * template + i == hit
            if is_hit and answer.failed_clearly:
                tally.ended += 1
            elif answer == wanted:
                tally.survived += is_hit
                if is_hit and fault.lasting and not fault.late and not fault.beyond:
                    problems.append("the request that was hit went on")
            else:
                problems.append(f"request {i} ({'hit' if is_hit else 'another'}) was told {answer}, not {wanted}")
        tally.broken += [f"{fault} in batch {template}: {problem}" for problem in problems]
        report(tally)
        for line in tally.broken[known_broken:]:
            print("BROKEN:", line, flush=True)
        known_broken = len(tally.broken)
        if len(tally.broken) > 20 or stage.run.done():
            break
    return tally


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No log of what is done on purpose."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
