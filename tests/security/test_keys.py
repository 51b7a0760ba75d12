"""Keys: without one nothing is answered but the probes, in whatever form the request comes; and no key is ever shown."""

import itertools
import json
import logging
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import command
from scripted_engine import Live

from minivllm.cli.main import main
from minivllm.config import make_config
from minivllm.engine.ipc import Start
from minivllm.errors import InvalidOption
from minivllm.server.auth import OPEN_PATHS
from minivllm.server.keys import Keys, Salts, check_exposure, read_keys

KEYS = {"ann": "key-of-ann-0123456789", "bob": "key-of-bob-9876543210"}  # as in the fixture ``key_file``
ANN = KEYS["ann"]
BODY = b'{"prompt": "x", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}], "tokens": [1]}'
JSON = b"Content-Type: application/json\r\n"
HOST = b"Host: 127.0.0.1\r\n"


def request(path: bytes, method: bytes = b"POST", more: bytes = b"", host: bytes = HOST, version: bytes = b"1.1") -> bytes:
    body = b"" if method in (b"GET", b"HEAD", b"OPTIONS") else BODY
    if b"Connection:" not in more:
        more += b"Connection: close\r\n"
    return b"%s %s HTTP/%s\r\n%s%s%sContent-Length: %d\r\n\r\n%s" % (method, path, version, host, JSON, more, len(body), body)


def bearer(key: str, scheme: str = "Bearer") -> bytes:
    return f"Authorization: {scheme} {key}\r\n".encode()


STAY = b"Connection: keep-alive\r\n"
UPGRADE = b"Connection: Upgrade\r\nUpgrade: %s\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
Form = Callable[[bytes, bytes], bytes]
FORMS: dict[str, Form] = {
    "no key": lambda p, m: request(p, m),
    "wrong key": lambda p, m: request(p, m, bearer("wrong")),
    "empty key": lambda p, m: request(p, m, bearer("")),
    "beginning of a key": lambda p, m: request(p, m, bearer(ANN[:-1])),
    "more than a key": lambda p, m: request(p, m, bearer(ANN + "x")),
    "other case": lambda p, m: request(p, m, bearer(ANN.upper())),
    "other scheme": lambda p, m: request(p, m, bearer(ANN, "Basic")),
    "key without scheme": lambda p, m: request(p, m, f"Authorization: {ANN}\r\n".encode()),
    "two keys, one right": lambda p, m: request(p, m, bearer(ANN) + bearer("wrong")),
    "two keys, the other right": lambda p, m: request(p, m, bearer("wrong") + bearer(ANN)),
    "two keys in one header": lambda p, m: request(p, m, bearer(f"{ANN}, Bearer {ANN}")),
    "key in other headers": lambda p, m: request(p, m, f"X-API-Key: {ANN}\r\nProxy-Authorization: Bearer {ANN}\r\n".encode()),
    "key in a cookie": lambda p, m: request(p, m, f"Cookie: Authorization=Bearer {ANN}\r\n".encode()),
    "key in the query": lambda p, m: request(p + f"?api_key={ANN}&Authorization=Bearer+{ANN}".encode(), m),
    "two slashes": lambda p, m: request(b"/" + p, m),
    "up": lambda p, m: request(b"/v1/.." + p, m),
    "up from an open path": lambda p, m: request(b"/live/.." + p, m),
    "encoded dots": lambda p, m: request(b"/live/%2e%2e" + p, m),
    "encoded slash": lambda p, m: request(b"/live%2f.." + p, m),
    "encoded letters": lambda p, m: request(b"/" + b"".join(b"%%%02x" % c for c in p[1:]), m),
    "an encoded open path": lambda _, m: request(b"/%6cive", m),
    "semicolon": lambda p, m: request(p + b";/live", m),
    "semicolon behind an open path": lambda p, m: request(b"/live;" + p, m),
    "trailing space": lambda p, m: request(p + b" ", m),
    "encoded trailing space": lambda p, m: request(p + b"%20", m),
    "trailing slash": lambda p, m: request(p + b"/", m),
    "NUL": lambda p, m: request(p + b"%00/live", m),
    "backslash": lambda p, m: request(b"/live\\.." + p, m),
    "HTTP/1.0": lambda p, m: request(p, m, version=b"1.0"),
    "HTTP/1.0 without a host": lambda p, m: request(p, m, host=b"", version=b"1.0"),
    "absolute": lambda p, m: request(b"http://127.0.0.1" + p, m),
    "absolute with an open path as its host": lambda p, m: request(b"http://live/" + p, m),
    "absolute with a user": lambda p, m: request(b"http://x:" + ANN.encode() + b"@127.0.0.1" + p, m),
    "slash in the host": lambda p, m: request(p, m, host=b"Host: 127.0.0.1/live?x=\r\n"),
    "query in the host": lambda p, m: request(p, m, host=b"Host: 127.0.0.1?x=/live\r\n"),
    "fragment in the host": lambda p, m: request(p, m, host=b"Host: 127.0.0.1/health#\r\n"),
    "two hosts": lambda p, m: request(p, m, host=HOST + b"Host: x/live?\r\n"),
    "forwarded for": lambda p, m: request(p, m, b"X-Forwarded-For: 127.0.0.1\r\nForwarded: for=127.0.0.1\r\n"),
    "real address": lambda p, m: request(p, m, b"X-Real-IP: 127.0.0.1\r\nX-Client-IP: ::1\r\n"),
    "forwarded prefix": lambda p, m: request(p, m, b"X-Forwarded-Prefix: /live\r\nX-Forwarded-Path: /live\r\n"),
    "forwarded host": lambda p, m: request(p, m, b"X-Forwarded-Host: x/live?\r\nX-Host: x/live?\r\n"),
    "original URL": lambda p, m: request(p, m, b"X-Original-URL: /live\r\nX-Rewrite-URL: /live\r\nX-Original-URI: /live\r\n"),
    "open path, original URL": lambda p, m: request(b"/x", m, b"X-Original-URL: " + p + b"\r\nX-Rewrite-URL: " + p + b"\r\n"),
    "method override": lambda p, m: request(p, b"GET", b"X-HTTP-Method-Override: " + m + b"\r\n"),
    "OPTIONS": lambda p, _: request(p, b"OPTIONS", b"Origin: http://x\r\nAccess-Control-Request-Method: POST\r\n"),
    "HEAD": lambda p, _: request(p, b"HEAD"),
    "DELETE": lambda p, _: request(p, b"DELETE"),
    "WebSocket": lambda p, _: request(p, b"GET", UPGRADE % b"websocket"),
    "HTTP/2 upgrade": lambda p, m: request(p, m, UPGRADE % b"h2c" + b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n"),
    "behind an open path": lambda p, m: request(b"/live", b"GET", STAY) + request(p, m),
    "behind a right key": lambda p, m: request(b"/version", b"GET", STAY + bearer(ANN)) + request(p, m),
    "in an open path's query": lambda p, m: request(b"/wibble?" + p, m),
    "expects 100": lambda p, m: request(p, m, b"Expect: 100-continue\r\n"),
}  # fmt: skip


def routes(live: Live) -> list[tuple[str, str]]:
    """Every route and one of its methods, as the router knows them; some that are not there too."""
    found = [(r.path, sorted(r.methods)[0]) for r in every_route(live.app.routes) if r.path not in OPEN_PATHS]
    assert len(found) >= 9
    return [*((path.replace("{name:path}", "fox"), method) for path, method in found), ("/wibble", "GET"), ("/docs", "GET")]


def every_route(routes: Any) -> Any:
    for route in routes:
        if hasattr(route, "methods"):
            yield route
        else:
            yield from every_route(getattr(getattr(route, "original_router", route), "routes", ()))


@pytest.mark.parametrize("form", FORMS)
def test_no_form_of_a_request_goes_around_the_key(locked: Live, speak: Callable[..., bytes], form: str) -> None:
    before = len(locked.client.added)
    for path, method in routes(locked):
        reply = speak(locked.port, FORMS[form](path.encode(), method.encode()))
        statuses = [int(found) for found in re.findall(rb"HTTP/1\.[01] (\d\d\d) ", reply)]
        if form.startswith("behind"):
            assert statuses.pop(0) in (200, 404)
        assert statuses and set(statuses) <= {400, 401}, (path, reply[:300])
        assert 100 not in statuses
    assert len(locked.client.added) == before


def test_a_key_opens_every_route(locked: Live, speak: Callable[..., bytes]) -> None:
    for path, method in routes(locked):
        for key in KEYS.values():
            status = int(speak(locked.port, request(path.encode(), method.encode(), bearer(key, "bearer"))).split()[1])
            nothing = path in ("/wibble", "/docs", "/requests/{request_id}")  # nobody has asked for anything yet
            assert (status == 404) == nothing and status not in (401, 500)


def test_the_refusal(locked: Live) -> None:
    reply = httpx.post(f"{locked.url}/v1/completions", json={"prompt": "x"})
    assert (reply.status_code, reply.json()) == (401, {"error": "Unauthorized"})
    assert reply.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{locked.url}/health").status_code == 200


def test_without_keys_everybody_is_served(unlocked: Live) -> None:
    for headers in ({}, {"authorization": "Bearer anything"}):
        reply = httpx.post(f"{unlocked.url}/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers=headers)
        assert reply.status_code == 200


def test_a_strangers_body_is_not_waited_for(locked: Live, speak: Callable[..., bytes]) -> None:
    """The answer comes at once, whatever is announced; with a key the length is what is refused."""
    for framing in (b"Content-Length: 99999999999\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\nFFFFFFF\r\n"):
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + JSON
        assert speak(locked.port, head + framing).split()[1] == b"401"
    assert speak(locked.port, head + bearer(ANN) + b"Content-Length: 99999999999\r\n\r\n").split()[1] == b"413"


SMUGGLED = request(b"/smuggled", b"GET", bearer(ANN))
POST = b"POST /generate HTTP/1.1\r\nHost: x\r\n" + bearer(ANN)
AMBIGUOUS = {
    "CL.TE": POST + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "TE.CL": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    "TE.TE other": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: cow\r\n\r\n0\r\n\r\n",
    "TE.TE other first": POST + b"Transfer-Encoding: cow\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "TE not last": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "TE of another name": POST + b"Transfer-Encoding: xchunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "TE with a space before the colon": POST + b"Transfer-Encoding : chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "TE after a tab": POST + b"\tTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "TE with a vertical tab": POST + b"Transfer-Encoding:\x0bchunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "TE behind a bare LF": POST + b"X: a\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "TE behind a bare CR": POST + b"X: a\rTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "TE folded": POST + b"Transfer-Encoding:\r\n chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "two lengths": POST + b"Content-Length: 0\r\nContent-Length: 5\r\n\r\n",
    "two lengths in one": POST + b"Content-Length: 0, 5\r\n\r\n",
    "a length with a sign": POST + b"Content-Length: +5\r\n\r\nhello",
    "a length in hex": POST + b"Content-Length: 0x5\r\n\r\nhello",
    "a length in parts": POST + b"Content-Length: 0 5\r\n\r\nhello",
    "an endless length": POST + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n",
    "a chunk's size with a sign": POST + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
    "a chunk's size in hex": POST + b"Transfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n",
    "an endless chunk's size": POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"F" * 40 + b"\r\n\r\n",
    "a chunk without its end": POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nxxx0\r\n\r\n",
    "a chunk's extension with a bare LF": POST + b"Transfer-Encoding: chunked\r\n\r\n1;x\nx\r\n0\r\n\r\n",
    "headers end with bare LFs": b"GET /version HTTP/1.1\nHost: x\n\n",
    "a bare LF in a header": b"GET /version HTTP/1.1\r\nHost: x\r\nX: a\nContent-Length: 5\r\n\r\n",
    "NUL in a header": b"GET /version HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
    "no colon": b"GET /version HTTP/1.1\r\nHost x\r\n\r\n",
    "two versions": b"GET /version HTTP/1.1 HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.mark.parametrize("form", AMBIGUOUS)
def test_what_could_be_read_in_two_ways_is_refused_and_ends_the_connection(
    locked: Live, speak: Callable[..., bytes], form: str
) -> None:
    """A proxy may have read it the other way; what follows would be somebody else's request."""
    reply = speak(locked.port, AMBIGUOUS[form] + SMUGGLED, quiet_s=2.0)
    assert re.findall(rb"HTTP/1\.1 (\d+) ", reply) == [b"400"], reply[:300]
    assert b"connection: close" in reply.lower()


def test_a_get_with_a_body_keeps_its_place(locked: Live, speak: Callable[..., bytes]) -> None:
    """The body of a GET is no request, and the one behind it is."""
    with_body = b"GET /version HTTP/1.1\r\nHost: x\r\n" + bearer(ANN) + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED
    reply = speak(locked.port, with_body + request(b"/version", b"GET", bearer(ANN)))
    assert re.findall(rb"HTTP/1\.1 (\d+) ", reply) == [b"200", b"200"]


# ------------------------------------------------------------------------------------------------------------------- keys


def keys_of(tmp_path: Path, text: str, mode: int = 0o600, **options: Any) -> Keys:
    path = tmp_path / "keys"
    path.write_text(text)
    path.chmod(mode)
    return read_keys(make_config(api_key_file=str(path), **options).server)


def test_keys_of_a_file_and_of_options(tmp_path: Path) -> None:
    text = "# all\n\nann: aaa\nbob bbb # his\n  bob\tccc\n"
    keys = keys_of(tmp_path, text, api_key=("ddd,eee", "fff"))
    asked = [keys.tenant(key) for key in (b"aaa", b"bbb", b"ccc", b"ddd", b"eee", b"fff", b"", b"aa", b"aaaa", b"AAA", b"ann")]
    assert asked == ["ann", "bob", "bob", "key-1", "key-2", "key-3", None, None, None, None, None]
    assert keys.tenants == {"ann", "bob", "key-1", "key-2", "key-3"}
    assert not read_keys(make_config().server)


@pytest.mark.parametrize("text", ["", "# no\n", "one", "a b c", "x/y secret", "a b,c", "ann s\u00e9cret", "a same\nb same"])
def test_files_that_are_no_keys(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidOption) as refusal:
        keys_of(tmp_path, text)
    for secret in ("secret", "s\u00e9cret", "same", str(tmp_path)):
        assert secret not in str(refusal.value)


@pytest.mark.parametrize("key", ["", "a b", ",", "a,,b", "s\u00e9cret", "x" * 513])
def test_options_that_are_no_keys(key: str) -> None:
    with pytest.raises(InvalidOption):
        read_keys(make_config(api_key=(key,)).server)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(InvalidOption, match="cannot be read"):
            read_keys(make_config(api_key_file=str(path)).server)


def test_a_file_that_everybody_can_read_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys"
    path.write_text("ann secret")
    for mode, warned in ((0o600, 0), (0o640, 0), (0o644, 1)):
        path.chmod(mode)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            check_exposure(make_config(api_key_file=str(path)).server)
        assert len(caplog.records) == warned and "secret" not in caplog.text


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("localhost", True), ("127.8.8.8", True), ("::1", True), ("0.0.0.0", False), ("::", False),
     ("", False), ("192.0.2.1", False), ("::ffff:192.0.2.1", False), ("no such host", False)],
)  # fmt: skip
def test_strangers_reach_only_a_server_with_keys(host: str, local: bool) -> None:
    check_exposure(make_config(host=host, api_key=("x",)).server)
    if local:
        check_exposure(make_config(host=host).server)
    else:
        with pytest.raises(InvalidOption, match="needs a key"):
            check_exposure(make_config(host=host).server)


def test_the_command_refuses_before_it_loads_anything(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--host", "0.0.0.0", "--port", "0"]) == 2
    assert re.fullmatch(r"mini-vllm: error: --host 0\.0\.0\.0 .* needs a key: .*\n", capfd.readouterr().err)


def test_no_key_is_shown(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "key-that-nobody-may-see"
    config = make_config(api_key=(secret,))
    shown = [repr(config), str(config), repr(config.server), repr(vars(read_keys(config.server)))]
    shown += [repr(read_keys(config.server)), repr(Start(config.without_keys)), repr(Salts(read_keys(config.server)))]
    monkeypatch.setenv("MINIVLLM_API_KEY", secret)
    with pytest.raises(SystemExit):
        main(["serve", "--help=all"])
    main(["serve", "--wibble"])
    main(["serve", "--api-key", secret, "--port", "x"])
    main(["serve", "--api-key", secret + " " + secret, "--host", "0.0.0.0"])
    shown += list(capfd.readouterr())
    assert not [text for text in shown if secret in text]
    assert config.without_keys.server.api_key == () and config.without_keys.server.api_key_file is None


def test_an_option_takes_no_word_after_its_key() -> None:
    """A model's name behind it would become a key that everybody knows."""
    done = subprocess.run(command("serve", "--api-key", "x", "no-such/model-here", "--host", "0.0.0.0", "--port", "70000"),
                          capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert done.returncode == 2 and "--port must be" in done.stderr


def test_tenants_do_not_share_cached_prefixes() -> None:
    two, one, none = (Salts(Keys(named)) for named in ([("a", "1"), ("b", "2")], [("a", "1"), ("a", "2")], []))
    given = list(itertools.product(("a", "b", "1:a", ""), ("", "x", "a", "b")))
    assert len({two.salt(*pair) for pair in given}) == len(given)
    assert all(two.salt(*pair) == two.salt(*pair) for pair in given)
    assert Salts(Keys([("a", "1"), ("b", "2")])).salt("a", "") != two.salt("a", "")
    for same in (one, none):
        assert [same.salt("a", wanted) for wanted in ("", "x")] == ["", "x"]


def test_every_generating_route_uses_its_tenants_salt(locked: Live, unlocked: Live) -> None:
    bodies = {
        "/generate": {"prompt": "x", "max_tokens": 1},
        "/v1/completions": {"prompt": "x", "max_tokens": 1},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    }
    for path, body in bodies.items():
        salts = []
        for key in KEYS.values():
            for salt in ({},) if path == "/generate" else ({}, {"cache_salt": "s"}):
                locked.client.added.clear()
                reply = httpx.post(locked.url + path, json={**body, **salt}, headers={"authorization": f"Bearer {key}"})
                assert reply.status_code == 200
                salts += [added.cache_salt for added in locked.client.added]
        assert len(set(salts)) == len(salts) >= 2 and all(len(salt) == 64 for salt in salts)
        unlocked.client.added.clear()
        assert httpx.post(unlocked.url + path, json=body).status_code == 200
        assert [added.cache_salt for added in unlocked.client.added] == [""]


def test_beams_use_it_too(locked: Live) -> None:
    locked.client.added.clear()
    body = json.dumps({"prompt": "x", "max_tokens": 2, "n": 2, "use_beam_search": True})
    headers = {"authorization": f"Bearer {ANN}", "content-type": "application/json"}
    assert httpx.post(f"{locked.url}/v1/completions", content=body, headers=headers).status_code == 200
    assert {len(added.cache_salt) for added in locked.client.added} == {64}


# ---------------------------------------------------------------------------------------------------------------- metrics


def test_metrics_on_a_port_of_their_own(tokenizer: Any) -> None:
    live = Live(tokenizer, make_config(port=0, metrics_port=0, api_key=("k" * 20,))).start()
    try:
        assert live.server.metrics is not None
        url = live.server.metrics.url
        assert httpx.get(f"{url}/metrics").json()["active_requests"] == 0
        assert "# TYPE" in httpx.get(f"{url}/metrics/prometheus").text
        for path in ("/v1/models", "/health", "/openapi.json", "/generate", "/"):
            assert httpx.get(url + path).status_code == 404
        assert httpx.get(f"{live.url}/metrics").status_code == 401
        headers = {"authorization": "Bearer " + "k" * 20}
        assert httpx.get(f"{live.url}/metrics", headers=headers).status_code == 404
        assert httpx.get(f"{live.url}/version", headers=headers).status_code == 200
    finally:
        live.end()
