"""What is counted in and out, when there is no room, and what those who are refused are told."""

import asyncio
import json
import math
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import scripted_engine
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import Live

from minivllm.async_llm import Order
from minivllm.beams import BeamSearchParams
from minivllm.errors import RequestError, ServerOverloaded, TooManyRequests
from minivllm.server.admission import Admission, Bounds, Cost, Ticket, cost_of, cost_of_beams
from minivllm.server.gate import AdmissionGate, ticket_of
from minivllm.server.http import capacity_of
from minivllm.types import SamplingParams

Until = Callable[[Callable[[], bool]], None]


class Door:
    """An ``Admission`` and what it refused. Written by the test."""

    def __init__(self, **bounds: int | None) -> None:
        self.refused: list[str] = []
        self.now = 1000.0
        self.admission = Admission(Bounds(**{"requests": 10, "tokens": 1000} | bounds), self.now, self.refused.append)  # type: ignore[arg-type]

    def come(self, tenant: str = "", guess: int = 10, cost: Cost | None = None) -> Ticket:
        ticket = self.admission.reserve(tenant, guess, self.now)
        if cost is not None:
            self.admission.settle(ticket, cost, self.now)
        return ticket

    def go(self, *tickets: Ticket) -> None:
        for ticket in tickets:
            self.admission.release(ticket, self.now)


def test_the_queue_is_bounded_in_requests() -> None:
    door = Door()
    tickets = [door.come() for _ in range(10)]
    assert door.admission.full
    with pytest.raises(ServerOverloaded):
        door.come()
    assert door.refused == ["queue_requests"]
    door.go(tickets[0])
    assert not door.admission.full
    door.come()


def test_the_queue_is_bounded_in_tokens_by_the_guess_and_by_the_cost() -> None:
    door = Door()
    first = door.come(guess=600)
    with pytest.raises(ServerOverloaded):
        door.come(guess=600)
    door.admission.settle(first, Cost(1, 100), door.now)  # it was a long body of few tokens
    second = door.come(guess=600)
    with pytest.raises(ServerOverloaded):
        door.admission.settle(second, Cost(1, 901), door.now)
    assert door.refused == ["queue_tokens", "queue_tokens"]
    assert (door.admission.requests, door.admission.tokens) == (2, 700)
    door.go(first, second)
    assert (door.admission.requests, door.admission.tokens) == (0, 0)


def test_every_text_counts_as_a_request() -> None:
    door = Door()
    ticket = door.come(cost=Cost(8, 80))
    door.come()
    late = door.come()
    with pytest.raises(ServerOverloaded):
        door.admission.settle(late, Cost(2, 10), door.now)
    door.go(ticket)
    door.admission.settle(late, Cost(2, 10), door.now)


def test_what_is_larger_than_the_queue_is_taken_when_nothing_else_is_there() -> None:
    door = Door()
    small = door.come()
    large = door.come()
    with pytest.raises(ServerOverloaded):
        door.admission.settle(large, Cost(20, 5000), door.now)
    door.go(small)
    door.admission.settle(large, Cost(20, 5000), door.now)
    with pytest.raises(ServerOverloaded):
        door.come()


def test_a_keys_requests_are_bounded_whatever_the_others_do() -> None:
    door = Door(requests_per_key=2)
    mine = [door.come("me"), door.come("me")]
    with pytest.raises(TooManyRequests, match="2 requests open"):
        door.come("me")
    door.come("you")
    door.go(mine[0])
    late = door.come("me")
    with pytest.raises(TooManyRequests):
        door.admission.settle(late, Cost(2, 10), door.now)  # n=2
    assert door.refused == ["key_requests", "key_requests"]


def test_a_keys_tokens_come_back_by_the_minute() -> None:
    door = Door(tokens_per_minute_per_key=600, tokens=10**6)
    ticket = door.come("me", cost=Cost(1, 900))  # may bring it into debt
    with pytest.raises(TooManyRequests) as refused:
        door.come("me")
    assert refused.value.retry_after_s == math.ceil(301 / 10)
    door.come("you")
    door.now += refused.value.retry_after_s - 1
    with pytest.raises(TooManyRequests):
        door.come("me")
    door.now += 1
    door.come("me")
    door.go(ticket)
    assert door.refused == ["key_tokens", "key_tokens"]


def test_tokens_that_were_not_generated_are_given_back_to_the_key() -> None:
    door = Door(tokens_per_minute_per_key=600, tokens=10**6)
    ticket = door.come("me", cost=Cost(1, 900, output=800))
    ticket.num_output = 10
    door.go(ticket)
    door.come("me", cost=Cost(1, 489))
    door.come("me", cost=Cost(1, 1))
    with pytest.raises(TooManyRequests):
        door.come("me")


def test_retry_after_follows_the_rate_at_which_work_is_done() -> None:
    """Two requests a second are finished: the first who is refused may come in a second, the twentieth in ten."""
    door = Door(requests=10)
    tickets = [door.come(cost=Cost(1, 10)) for _ in range(10)]
    for _ in range(20):
        door.now += 0.5
        door.go(tickets.pop(0))
        tickets.append(door.come(cost=Cost(1, 10)))
    told = []
    for _ in range(200):
        with pytest.raises(ServerOverloaded) as refused:
            door.come()
        told.append(refused.value.retry_after_s)
    assert told[0] == 1
    assert 9 <= told[19] <= 12
    assert told == sorted(told)
    assert told[-1] == 60  # and no more
    assert all(isinstance(wait_s, int) for wait_s in told)
    assert "retry in 60 s" in str(refused.value)


def test_long_requests_are_told_to_wait_for_their_tokens() -> None:
    door = Door(requests=1000, tokens=1000)
    tickets = [door.come(cost=Cost(1, 100)) for _ in range(10)]
    for _ in range(10):  # 100 tokens a second
        door.now += 1
        door.go(tickets.pop(0))
        tickets.append(door.come(cost=Cost(1, 100)))
    with pytest.raises(ServerOverloaded) as refused:
        door.come(guess=800)
    assert 7 <= refused.value.retry_after_s <= 9


def test_where_nothing_is_finished_the_wait_is_as_long_again() -> None:
    door = Door(requests=1)
    door.come()
    for now, expected in ((1000.0, 1), (1007.5, 8), (1500.0, 60)):
        door.now = now
        with pytest.raises(ServerOverloaded) as refused:
            door.come()
        assert refused.value.retry_after_s == expected


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(0, 700), st.sampled_from("ab")), max_size=60))
def test_what_comes_in_goes_out(moves: list[tuple[int, int, int, str]]) -> None:
    door = Door(requests_per_key=8, tokens_per_minute_per_key=2000)
    tickets: list[Ticket] = []
    for move, requests, tokens, tenant in moves:
        door.now += 0.3
        try:
            if move == 0 and tickets:
                door.go(tickets.pop(tokens % len(tickets)))
            elif move == 1 and tickets:
                door.admission.settle(tickets[tokens % len(tickets)], Cost(requests, tokens, tokens // 2), door.now)
            else:
                tickets.append(door.come(tenant, tokens))
        except RequestError:
            assert door.refused.pop()
        assert not door.refused
        assert door.admission.requests == sum(t.cost.requests for t in tickets)
        assert door.admission.tokens == sum(t.cost.tokens for t in tickets)
        alone = len(tickets) == 1
        assert door.admission.requests <= 10 or alone
        assert door.admission.tokens <= 1000 or any(t.cost.tokens > 300 for t in tickets)
    door.go(*tickets, *tickets)  # giving back twice is giving back
    assert (door.admission.requests, door.admission.tokens) == (0, 0)


def test_what_a_request_costs() -> None:
    def order(name: str, fork_of: str | None = None, **sampling: int | None) -> Order:
        return Order(name, (1,) * 100, SamplingParams(**{"max_tokens": 50} | sampling), fork_of=fork_of)  # type: ignore[arg-type]

    assert cost_of([order("a")], 512) == Cost(1, 150, 50)
    assert cost_of([order("a", max_tokens=None)], 512) == Cost(1, 512, 412)
    assert cost_of([order("a"), order("b", "a"), order("c", "a")], 512) == Cost(3, 250, 150)  # n shares its prompt
    assert cost_of([order("a"), order("b")], 512) == Cost(2, 300, 100)  # a list of prompts does not
    assert cost_of([order("a", logprobs=19)], 512) == Cost(1, 150 + 50 * 5, 50)
    assert cost_of([order("a", prompt_logprobs=3)], 512) == Cost(1, 150 + 100, 50)
    beams = cost_of_beams([(order("a"), BeamSearchParams(beam_width=4, max_tokens=10))])
    assert beams == Cost(4, 100 + math.ceil(40 * (1 + 9 * 0.25)))


# ---------------------------------------------------------------------------------------------------------- over the wire


BODIES = {
    "/generate": {"prompt": "x", "max_tokens": 400},
    "/v1/completions": {"prompt": "x", "max_tokens": 400},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 400},
}


def ask_slowly(live: Live, path: str, body: dict) -> socket.socket:
    """A request whose answer is not read."""
    data = json.dumps(body).encode()
    sock = socket.create_connection(("127.0.0.1", live.port), timeout=20)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    sock.sendall(head.encode() + data)
    return sock


def queue_of_one(start: Callable[..., Live], until: Until, **options: int) -> tuple[Live, list[socket.socket]]:
    """A server that is full: its engine says that 8 run at once."""
    live = start(max_num_queued_reqs=1, **options)
    live.client.hold = True
    socks = [ask_slowly(live, "/generate", BODIES["/generate"]) for _ in range(9)]
    until(lambda: live.llm.num_open == 9)
    return live, socks


def test_a_full_queue_is_told_when_to_come_back(start: Callable[..., Live], until: Until) -> None:
    live, socks = queue_of_one(start, until)
    for path, body in BODIES.items():
        for asked in (body, {**body, "stream": True}) if path != "/generate" else (body,):
            reply = httpx.post(f"{live.url}{path}", json=asked)
            assert reply.status_code == 503
            assert int(reply.headers["retry-after"]) >= 1
            assert reply.json()["error"]["type"] == "ServiceUnavailableError"
    assert len(live.client.added) == 9
    assert httpx.get(f"{live.url}/live").status_code == 200  # looking is always allowed
    told = httpx.get(f"{live.url}/metrics/prometheus").text
    assert 'vllm:admission_rejections_total{engine="0",model_name="fox",reason="queue_requests"} 5.0' in told
    for sock in socks:
        sock.close()
    until(lambda: live.app.state.serving.admission.requests == 0)
    assert live.app.state.serving.admission.tokens == 0


def test_a_refusal_comes_before_the_body(start: Callable[..., Live], until: Until) -> None:
    live, socks = queue_of_one(start, until)
    with socket.create_connection(("127.0.0.1", live.port), timeout=20) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 4000000\r\n\r\n")
        assert sock.recv(1000).startswith(b"HTTP/1.1 503 ")
    for sock in socks:
        sock.close()


def test_n_and_lists_of_prompts_count(start: Callable[..., Live], until: Until) -> None:
    live = start(max_num_queued_reqs=0)
    live.client.hold = True
    sock = ask_slowly(live, "/v1/completions", {"prompt": ["a", "b", "c"], "n": 2, "temperature": 1, "max_tokens": 9})
    until(lambda: live.llm.num_open == 6)
    many = httpx.post(f"{live.url}/v1/completions", json={"prompt": "x", "n": 3, "temperature": 1, "stream": True})
    assert many.status_code == 503
    assert live.app.state.serving.admission.requests == 6
    sock.close()


@pytest.mark.parametrize("stream", [True, False])
def test_everything_is_given_back(start: Callable[..., Live], until: Until, stream: bool) -> None:
    live = start(delay_s=0.001)
    good = {"prompt": "x", "max_tokens": 5, "stream": stream}
    for body in (good, {**good, "max_tokens": 10**6}, {"prompt": 5}, {**good, "n": 3, "temperature": 1}):
        httpx.post(f"{live.url}/v1/completions", json=body)
        until(lambda: live.app.state.serving.admission.requests == 0)
    live.client.failing = True
    httpx.post(f"{live.url}/v1/completions", json=good)
    httpx.post(f"{live.url}/tokenize", json={"prompt": "x"})
    beams = {"prompt": "x", "use_beam_search": True, "n": 2, "max_tokens": 3}
    httpx.post(f"{live.url}/v1/completions", json=beams)
    until(lambda: live.app.state.serving.admission.requests == 0)
    assert live.app.state.serving.admission.tokens == 0


def test_a_key_is_told_429(start: Callable[..., Live], until: Until) -> None:
    live = start(max_requests_per_key=1)
    live.client.hold = True
    sock = ask_slowly(live, "/generate", BODIES["/generate"])
    until(lambda: live.llm.num_open == 1)
    reply = httpx.post(f"{live.url}/v1/completions", json=BODIES["/v1/completions"])
    assert reply.status_code == 429
    assert int(reply.headers["retry-after"]) >= 1
    assert reply.json()["error"]["type"] == "RateLimitError"
    sock.close()


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_waits_too_long_for_its_turn(start: Callable[..., Live], until: Until, path: str, stream: bool) -> None:
    live = start(queue_timeout_s=0.2)
    live.client.hold = True
    reply = httpx.post(f"{live.url}{path}", json={**BODIES[path], **({"stream": True} if stream else {})})
    assert reply.status_code == 503
    assert reply.headers["retry-after"] == "1"
    assert "queue" in reply.json()["error"]["message"]
    until(lambda: live.client.aborted == [live.client.added[0].id])
    live.client.hold = False
    live.client.delay_s = 0.1
    assert httpx.post(f"{live.url}{path}", json={**BODIES[path], "max_tokens": 5}).status_code == 200  # it began in time
    assert live.llm.metrics.rejections == {"queue_timeout": 1}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_takes_too_long(start: Callable[..., Live], until: Until, path: str, stream: bool) -> None:
    live = start(delay_s=0.02, request_timeout_s=0.3)
    reply = httpx.post(f"{live.url}{path}", json={**BODIES[path], **({"stream": True} if stream else {})})
    if stream or path == "/generate":
        assert reply.status_code == 200
        assert "was not finished within 0.3 s" in reply.text
        assert path == "/generate" or reply.text.endswith("data: [DONE]\n\n")
    else:
        assert reply.status_code == 504
        assert "was not finished within 0.3 s" in reply.json()["error"]["message"]
    until(lambda: live.client.aborted == [live.client.added[0].id])


def test_too_many_connections_are_told_so(start: Callable[..., Live], until: Until) -> None:
    live = start(max_connections=3)
    idle = [socket.create_connection(("127.0.0.1", live.port), timeout=20) for _ in range(3)]
    until(lambda: len(live.server._state.connections) == 3)
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", live.port), timeout=20) as sock:
            answer = b""
            while part := sock.recv(1000):
                answer += part
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nretry-after: 1\r\n" in answer
        assert b"as many connections" in answer
    assert live.llm.metrics.rejections == {"connections": 5}
    for sock in idle:
        sock.close()
    until(lambda: not live.server._state.connections)
    assert httpx.get(f"{live.url}/live").status_code == 200


def test_a_flood_of_refusals_holds_up_nobody_who_is_in(start: Callable[..., Live], until: Until) -> None:
    live = start(delay_s=0.002, max_num_queued_reqs=0)
    texts: list[str] = []

    def read() -> None:
        texts.append(httpx.post(f"{live.url}/v1/completions", json={**BODIES["/v1/completions"], "stream": True}).text)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: live.llm.num_open == 8)
    with httpx.Client(base_url=live.url) as client:
        statuses = [client.post("/v1/completions", json=BODIES["/v1/completions"]).status_code for _ in range(30)]
    for thread in threads:
        thread.join()
    assert statuses == [503] * 30
    assert all(text.count('"finish_reason":"length"') == 1 for text in texts)


# ------------------------------------------------------------------------------------------------------------- its own layer


def test_the_gate_counts_by_tenant_and_by_the_declared_length() -> None:
    door = Door(tokens=10**6)
    seen: list[Ticket] = []

    async def app(scope: dict, receive: object, send: object) -> None:
        seen.append(ticket_of(scope))
        assert door.admission.requests == 1
        if scope["path"] == "/fails":
            raise RuntimeError("a fault of ours")

    async def ask(path: str, **headers: str) -> None:
        fields = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": "POST", "path": path, "headers": fields, "state": {"tenant": "me"}}
        await AdmissionGate(app, door.admission, 4000)(scope, None, None)  # type: ignore[arg-type]

    async def scene() -> None:
        await ask("/", content_length="80")
        await ask("/", content_length="9" * 30)
        await ask("/", content_length="10000")
        await ask("/", transfer_encoding="chunked")
        with pytest.raises(RuntimeError):
            await ask("/fails", content_length="80")

    guesses: list[int] = []
    reserve = door.admission.reserve
    door.admission.reserve = lambda tenant, guess, now: guesses.append(guess) or reserve(tenant, guess, now)  # type: ignore
    asyncio.run(scene())
    assert guesses == [20, 1000, 1000, 1000, 20]
    assert {ticket.tenant for ticket in seen} == {"me"}
    assert (door.admission.requests, door.admission.tokens) == (0, 0)
    with pytest.raises(RuntimeError, match="around the gate"):
        ticket_of({"type": "http"})


def test_connections_stay_below_the_limit_of_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def capacity(soft: int, asked: int | None = None) -> tuple[int, int]:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
        found = capacity_of(asked, lambda _: None)
        return found.most, found.spare

    assert capacity(1024) == (768, 128)
    assert capacity(1024, 100) == (100, 128)
    assert capacity(1024, 10**6) == (768, 128)
    assert capacity(100) == (50, 25)
    assert capacity(resource.RLIM_INFINITY)[0] == 2**20
    for soft in (64, 256, 1024, 10**6):
        most, spare = capacity(soft)
        assert most + spare < soft


def test_a_server_with_few_files_tells_strangers_so_and_goes_on(tokenizer_folder: Path) -> None:
    program = Path(scripted_engine.__file__)
    command = [sys.executable, str(program), str(tokenizer_folder), '{"header_timeout_s": 300}']
    env = {**os.environ, "PYTHONPATH": str(program.parents[2])}
    # 128 files: 64 connections, at most 32 more at a time that are told why not, the others are closed at once. One that is
    # just being taken counts twice for a moment, so how many are told is a matter of time.
    child = subprocess.Popen(
        ["prlimit", "--nofile=128:128", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    try:
        assert child.stdout is not None
        port = int(child.stdout.readline())
        socks = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(200)]
        answers = []
        for sock in reversed(socks):
            sock.settimeout(0.001 if len(answers) >= 136 else 20)
            try:
                answers.append(sock.recv(1000))
            except TimeoutError:
                answers.append(b"none")
            except ConnectionResetError:
                answers.append(b"")
            sock.close()
        assert answers.count(b"none") == 64  # they wait for a request
        assert any(answer.startswith(b"HTTP/1.1 503 ") for answer in answers)
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    finally:
        child.terminate()
        _, said = child.communicate(timeout=20)
    assert child.returncode == 0
    assert "open files" not in said
    assert "Traceback" not in said
