"""Hostile requests against a real server: none may hurt it, or anybody else.

    python -m benchmarks.reliability.hostile                     # 200,000 requests at the bundled model
    python -m benchmarks.reliability.hostile --requests 5000 --seed 3

Several connections send what ``hostile_requests`` makes, as fast as answers come. All the while canary streams (greedy, seeded,
a chat, several texts of one prompt) run again and again and have to say, byte for byte, what they said before the attack. The
promise is broken by an answer of 5xx (a 503 that says when to come back is asked for), by no answer, an error body that is
long or tells of the inside, a canary that changes, another process in place of one, and blocks that stay held.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.reliability.hostile_requests import Attacker, Request, post

LONGEST_ANSWER_S = 120.0
LEAKS = re.compile(rb" at 0x|Traceback|site-packages|minivllm/|\.py\b")
CHAT = [{"role": "user", "content": "Tell me of a bear."}]
SAMPLED: dict[str, Any] = {"max_tokens": 60, "temperature": 0.9, "seed": 7}
CANARIES: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("/generate", {"prompt": "Once upon a time", "max_tokens": 60}),
    "seeded": ("/v1/completions", {**SAMPLED, "prompt": "The little fox", "stream": True}),
    "chat": ("/v1/chat/completions", {**SAMPLED, "messages": CHAT, "logprobs": True, "top_logprobs": 2, "stream": True}),
    "several": ("/v1/completions", {**SAMPLED, "prompt": "A dog", "n": 3, "logprobs": 2}),
    "grammar": ("/v1/completions", {"prompt": "A name:", "temperature": 0, "structured_outputs": {"regex": "[A-Z][a-z]{2,9}"}}),
}


class Connection:
    """One keep-alive connection. Written by the task that attacks through it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: Request) -> tuple[int, bytes]:
        """Status and body; status 0: the connection ended without an answer."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=2**24)
        reader, writer = self._streams
        try:
            writer.write(request.data)
            if not request.plain:  # whatever it says, and then away
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.05):
                        line = await reader.readline()
                        self.close()
                        return int(line.split()[1]) if line else 0, b""
                self.close()
                return 0, b""
            async with asyncio.timeout(LONGEST_ANSWER_S):
                return await self._answer(reader)
        except (ConnectionError, asyncio.IncompleteReadError, IndexError):
            self.close()
            return 0, b""

    async def _answer(self, reader: asyncio.StreamReader) -> tuple[int, bytes]:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            status = int(head.split(b" ", 2)[1])
            if status != 100:
                break
        names = head.lower()
        if found := re.search(rb"content-length: (\d+)", names):
            body = await reader.readexactly(int(found[1]))
        else:
            body = b""
            while size := int(await reader.readline(), 16):
                body += (await reader.readexactly(size + 2))[:-2]
            await reader.readexactly(2)
        if b"connection: close" in names:
            self.close()
        return status, body

    def close(self) -> None:
        """Hang up."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


def said(body: bytes) -> dict[int, str]:
    """The texts of a reply by their index, and their logprobs at -1 - index, however they were cut into events."""
    texts: dict[int, str] = {}
    for part in body.split(b"\n\n") if body.startswith(b"data: ") else [b"data: " + body]:
        if part.startswith(b"data: {"):
            for choice in json.loads(part[6:])["choices"]:
                text = choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get("content") or ""
                texts[choice["index"]] = texts.get(choice["index"], "") + text
                logprobs = choice.get("logprobs") or {}
                for number in [each["logprob"] for each in logprobs.get("content", ())] + logprobs.get("token_logprobs", []):
                    texts[-1 - choice["index"]] = texts.get(-1 - choice["index"], "") + f"{number} "
    return texts


def native(body: bytes) -> str:
    """The text of a stream of /generate."""
    events = body.decode().split("\n\n")
    return "".join("\n".join(line.removeprefix("data: ") for line in event.split("\n")) for event in events if event)


class Attack:
    """What is known of the run so far. Written by its tasks, in one event loop."""

    def __init__(self, port: int, num_requests: int, seed: int) -> None:
        self.port = port
        self.left = num_requests
        self.attacker = Attacker(seed)
        self.statuses: Counter[int] = Counter()
        self.broken: list[str] = []
        self.num_canaries = 0
        self.slowest_s = 0.0
        self.expected: dict[str, Any] = {}
        self._over = asyncio.Event()

    async def canary(self, name: str, connection: Connection) -> Any:
        """What a canary says now."""
        path, body = CANARIES[name]
        status, reply = await connection.ask(post(path, json.dumps(body).encode()))
        return (status, native(reply) if path == "/generate" else said(reply))

    async def learn(self) -> None:
        """What the canaries say while nobody attacks; twice, so that it is known to be the same each time."""
        connection = Connection(self.port)
        for name in CANARIES:
            self.expected[name] = await self.canary(name, connection)
            if self.expected[name][0] != 200 or await self.canary(name, connection) != self.expected[name]:
                raise RuntimeError(f"the canary {name} does not say the same twice: {self.expected[name]}")
        connection.close()

    async def watch(self, name: str) -> None:
        """Run a canary over and over."""
        connection = Connection(self.port)
        while not self._over.is_set():
            found = await self.canary(name, connection)
            self.num_canaries += 1
            if found != self.expected[name]:
                self.broken.append(f"canary {name}: {str(found)[:300]}")
            await asyncio.sleep(0.2)
        connection.close()

    async def attack(self) -> None:
        """Send requests through one connection until there are no more to send."""
        connection = Connection(self.port)
        while self.left > 0:
            self.left -= 1
            request = self.attacker.next()
            began = time.monotonic()
            try:
                status, body = await connection.ask(request)
            except TimeoutError:
                status, body = 599, b""
                connection.close()
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            self.statuses[status] += 1
            if (why := self.fault(request, status, body)) is not None:
                self.broken.append(f"{why}: {request.data[:600]!r} -> {status} {body[:300]!r}")
        connection.close()

    def fault(self, request: Request, status: int, body: bytes) -> str | None:
        """What is wrong with an answer."""
        if status == 599:
            return f"no answer within {LONGEST_ANSWER_S:g} s"
        if status >= 500 and status != 503:
            return "a fault of the server"
        if not request.plain:
            return None
        if status == 0:
            return "the connection ended without an answer"
        if status >= 400 and len(body) > 4096:
            return "a long error"
        if status >= 400 and body and LEAKS.search(re.sub(rb"This route has no field '.*?'", b"", body)):
            return "an error that tells of the inside"
        if status < 400 and (found := re.search(rb'^(?:data: )?\{"error":.*?"code":(5\d\d)', body, re.MULTILINE)):
            return f"a stream that ended with {found[1].decode()}"
        return None

    async def run(self, num_connections: int) -> None:
        """Everything at once, until all requests are sent."""
        await self.learn()
        watches = [asyncio.create_task(self.watch(name)) for name in CANARIES]
        attacks = [asyncio.create_task(self.attack()) for _ in range(num_connections)]
        began, total = time.monotonic(), self.left
        while not all(task.done() for task in attacks):
            await asyncio.wait(attacks, timeout=15)
            rate = (total - self.left) / (time.monotonic() - began)
            sent, broken = total - self.left, len(self.broken)
            print(f"{sent:>8} sent, {rate:5.0f}/s, {self.num_canaries} canaries, {broken} broken", flush=True)
        self._over.set()
        await asyncio.gather(*attacks, *watches)


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(each for child in children for each in tree(int(child)))]


def lasting(pid: int) -> set[int]:
    """The processes of a server but its helpers, which are replaced when a stranger's program goes beyond its limits. One that
    is about to be a helper still has the server's own command line, or none: each is read once, since it changes meanwhile."""

    def command(each: int) -> bytes:
        return Path(f"/proc/{each}/cmdline").read_bytes()

    def lasts(told: bytes) -> bool:
        return b"helper_process" not in told and told not in (b"", command(pid))

    return {pid} | {each for each in tree(pid) if lasts(command(each))}


def resident_mib(pid: int) -> float:
    """Anonymous memory of a process, swapped or not."""
    found = re.findall(r"^(?:RssAnon|VmSwap):\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return sum(map(int, found)) / 1024


@contextlib.contextmanager
def server(*options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """``mini-vllm serve``, and its port."""
    command = [sys.executable, "-m", "minivllm", "serve", "--port", "0", "--batch-invariant", "--max-model-len", "256",
               "--keep-alive-timeout-s", "120", *options]  # fmt: skip
    log = (Path(tempfile.gettempdir()) / "hostile-server.log").open("w")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    try:
        if process.stdout is None:
            raise RuntimeError("the server has no output")
        for line in process.stdout:
            if found := re.search(r"Serving .* on http://127.0.0.1:(\d+)", line):
                yield process, int(found[1])
                break
        else:
            raise RuntimeError("the server did not start; its log says why")
    finally:
        process.terminate()
        process.wait(60)
        log.close()


async def idle(port: int) -> dict[str, Any]:
    """The metrics once nothing runs any more, or after a minute."""
    connection = Connection(port)
    for _ in range(300):
        metrics: dict[str, Any] = json.loads((await connection.ask(Request(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")))[1])
        if metrics["active_requests"] == metrics["waiting_requests"] == metrics["kv_cache_usage"] == 0:
            break
        await asyncio.sleep(0.2)
    connection.close()
    return metrics


def main() -> int:
    """Exit code 1 when the promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--connections", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with server() as (process, port):
        attack = Attack(port, arguments.requests, arguments.seed)
        before, memory = lasting(process.pid), resident_mib(process.pid)
        began = time.monotonic()
        asyncio.run(attack.run(arguments.connections))
        duration = time.monotonic() - began
        metrics = asyncio.run(idle(port))
        after = lasting(process.pid)
        open_requests = metrics["active_requests"] + metrics["waiting_requests"]
        rows = {
            "requests": arguments.requests,
            "requests a second": round(arguments.requests / duration, 1),
            "slowest answer, s": round(attack.slowest_s, 2),
            "answers by status (0: none was due)": dict(sorted(attack.statuses.items())),
            "canary replies compared": attack.num_canaries,
            "processes that are others now": len(before ^ after),
            "server's memory before and after, MiB": (round(memory), round(resident_mib(process.pid))),
            "requests and KV blocks left when idle": (open_requests, metrics["kv_cache_usage"]),
            "broken promises": len(attack.broken),
        }
        clean = process.poll() is None and before == after and metrics["kv_cache_usage"] == metrics["active_requests"] == 0
    for name, value in rows.items():
        print(f"{name:<42} {value}")
    for text in attack.broken[:50]:
        print("BROKEN", text)
    print(json.dumps(rows))
    return 0 if clean and not attack.broken else 1


if __name__ == "__main__":
    sys.exit(main())
