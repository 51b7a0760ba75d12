"""What a server is connected to: one listening port, its clients, and nothing else, also after it has served all it can."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from live_server import LiveServer, command, serve

LISTENING, ESTABLISHED = "0A", "01"
pytestmark = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="sockets are looked up in /proc")


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(each for child in children for each in tree(int(child)))]


def inodes(pids: list[int]) -> set[str]:
    """The sockets that processes hold."""
    found = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = str(fd.readlink())
            except OSError:
                continue
            if target.startswith("socket:["):
                found.add(target[8:-1])
    return found


def network(pids: list[int]) -> list[tuple[str, str, int, int]]:
    """Kind, state, own port and other port of each of their sockets that has to do with a network."""
    held, found = inodes(pids), []
    for kind in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6", "icmp", "udplite"):
        path = Path("/proc/net") / kind
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            fields = line.split()
            if fields[9] in held:
                ports = [int(fields[i].split(":")[1], 16) for i in (1, 2)]
                found.append((kind, fields[3], *ports))
    return found  # type: ignore[return-value]


def exercise(live: LiveServer) -> None:
    """Everything that starts a process or a thread: templates, grammars, long texts."""
    with httpx.Client(base_url=live.url, timeout=60) as client:
        chat = {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 8}
        for path, body in {
            "/v1/chat/completions": {**chat, "response_format": {"type": "json_object"}},
            "/v1/completions": {"prompt": "x " * 300, "max_tokens": 4, "structured_outputs": {"regex": "[a-z]{3}"}},
            "/tokenize": {"prompt": "word " * 30_000},
            "/generate": {"prompt": "Once", "max_tokens": 4},
        }.items():
            assert client.post(path, json=body).status_code == 200
        reaching = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://192.0.2.1/x"}}]}]}
        assert client.post("/v1/chat/completions", json=reaching).status_code == 400
        schema = {"$ref": "http://192.0.2.1/schema.json"}
        asked = {**chat, "structured_outputs": {"json": schema}}
        assert client.post("/v1/chat/completions", json=asked).status_code == 400


@pytest.mark.parametrize("own_port", [False, True])
def test_a_server_listens_on_its_ports_and_calls_nobody(own_port: bool) -> None:
    with serve(*(["--metrics-port", "0"] if own_port else [])) as live:
        exercise(live)
        pids = tree(live.process.pid)
        assert len(pids) >= 4  # the server, the engine, and a helper each for templates and grammars
        port = int(live.url.rsplit(":", 1)[1])
        found = network(pids)
        listening = [entry for entry in found if entry[1] == LISTENING]
        assert {kind for kind, *_ in found} == {"tcp"}
        assert len(listening) == 1 + own_port and port in {entry[2] for entry in listening}
        ours = {entry[2] for entry in listening}
        assert [entry for entry in found if entry[2] not in ours] == []  # a call of ours would come from another port
        assert live.stop() == 0


def test_spans_go_to_the_collector_that_was_named_and_nothing_goes_elsewhere() -> None:
    with socket.create_server(("127.0.0.1", 0)) as collector:
        chosen = collector.getsockname()[1]
        with serve("--otlp-traces-endpoint", f"http://127.0.0.1:{chosen}/v1/traces") as live:
            exercise(live)
            caller, _ = collector.accept()  # it is called, though it never answers
            ours = {int(live.url.rsplit(":", 1)[1]), chosen}
            found = network(tree(live.process.pid))
            assert {kind for kind, *_ in found} == {"tcp"} and len([e for e in found if e[1] == LISTENING]) == 1
            assert [entry for entry in found if not ours & {entry[2], entry[3]}] == []
            assert chosen in {entry[3] for entry in found}
            caller.close()


def test_the_look_at_sockets_sees_what_it_should() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as caller:
        port, other = listener.getsockname()[1], caller.getsockname()[1]
        found = network([os.getpid()])
        assert ("tcp", LISTENING, port, 0) in found and ("tcp", ESTABLISHED, other, port) in found


ALONE = """
import fcntl, socket, struct, subprocess, sys, re, httpx
with socket.socket() as s:  # a machine with no network but itself
    fcntl.ioctl(s, 0x8914, struct.pack("16sH14x", b"lo", 0x1 | 0x40))
server = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, text=True)
try:
    for line in server.stdout:
        if found := re.search(r"Serving .* on (http://\\S+)", line):
            body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "structured_outputs": {"json": {}}}
            reply = httpx.post(found[1] + "/v1/chat/completions", json=body, timeout=60)
            print(reply.status_code, reply.json()["usage"]["completion_tokens"])
            break
finally:
    server.terminate()
    print(server.wait(60))
"""


def test_a_server_needs_no_network() -> None:
    inside = ["unshare", "-rn", sys.executable, "-c", ALONE]
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode:
        pytest.skip("namespaces are not allowed here")
    repo = Path(__file__).resolve().parents[2]
    done = subprocess.run([*inside, *command("serve", "--port", "0", "--num-threads", "1")], capture_output=True, text=True,
                          timeout=120, check=False, cwd=repo, env={**os.environ, "PYTHONUNBUFFERED": "1"})  # fmt: skip
    assert done.stdout.split() == ["200", "4", "0"], done.stdout + done.stderr
