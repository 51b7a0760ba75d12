"""The routes' side of explanations: who may ask, what is refused, what every body may say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted_engine import Live

BODY = {"prompt": "Once", "max_tokens": 4}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
ROUTES = [("/v1/completions", BODY), ("/v1/chat/completions", CHAT)]
KEYS = {"ann": "key-of-ann", "bob": "key-of-bob"}


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize("value", ["yes", 1, "true", [], {}])
def test_only_true_and_false_are_taken(http: httpx.Client, path: str, body: dict[str, Any], value: object) -> None:
    reply = http.post(path, json={**body, "explain": value})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "body.explain" and "bool" in reply.json()["error"]["message"]


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize("value", [False, None])
def test_who_does_not_ask_is_told_nothing(http: httpx.Client, path: str, body: dict[str, Any], value: object) -> None:
    assert "explain" not in http.post(path, json={**body, "explain": value}).json()
    stream = http.post(path, json={**body, "explain": value, "stream": True})
    assert "explain" not in stream.text and '"choices":[]' not in stream.text


def test_a_beam_search_has_no_explanation(http: httpx.Client) -> None:
    reply = http.post("/v1/completions", json={**BODY, "explain": True, "use_beam_search": True, "n": 2})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "explain"


def test_a_request_that_nobody_knows(http: httpx.Client) -> None:
    for name in ("cmpl-x", "x" * 300, "%00", "a b"):
        reply = http.get(f"/requests/{name}")
        assert (reply.status_code, reply.json()["error"]["type"]) == (404, "NotFoundError")
        assert len(reply.content) < 500
    assert http.get("/requests/").status_code == http.get("/requests").status_code == 404
    assert http.post("/requests/x").status_code == 405


def test_a_refused_request_leaves_nothing(http: httpx.Client, live: Live) -> None:
    known = len(live.llm.explanations.ids)  # type: ignore[union-attr]
    assert http.post("/v1/completions", json={**BODY, "max_tokens": 10**6, "explain": True}).status_code == 400
    assert len(live.llm.explanations.ids) == known  # type: ignore[union-attr]


def test_without_records_nothing_is_explained(start: Callable[..., Live]) -> None:
    live = start(step_records=0)
    with httpx.Client(base_url=live.url, timeout=20) as http:
        for path, body in ROUTES:
            for stream in (False, True):
                error = http.post(path, json={**body, "explain": True, "stream": stream})
                assert error.status_code == 400 and error.json()["error"]["param"] == "explain"
                assert "--step-records 0" in error.json()["error"]["message"]
            reply = http.post(path, json={**body, "explain": False})
            assert reply.status_code == 200
        gone = http.get(f"/requests/{reply.json()['id']}")
        assert gone.status_code == 404 and "--step-records" in gone.json()["error"]["message"]


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("".join(f"{name} {key}\n" for name, key in KEYS.items()))
    path.chmod(0o600)
    return path


def test_once_there_are_keys_only_the_owner_is_told(start: Callable[..., Live], key_file: Path) -> None:
    live = start(api_key_file=str(key_file))
    ann, bob = ({"Authorization": f"Bearer {key}"} for key in KEYS.values())
    with httpx.Client(base_url=live.url, timeout=20) as http:
        reply = http.post("/v1/completions", json={**BODY, "explain": True}, headers=ann).json()
        assert reply["explain"]["id"] == reply["id"]
        for name in (reply["id"], f"{reply['id']}-0"):
            mine, theirs = (http.get(f"/requests/{name}", headers=key) for key in (ann, bob))
            assert mine.status_code == 200 and mine.json()["id"] == reply["id"]
            nobody = http.get(f"/requests/{'z' * len(name)}", headers=bob)
            assert theirs.status_code == nobody.status_code == 404
            assert theirs.text.replace(name, "") == nobody.text.replace("z" * len(name), "")
        assert http.get(f"/requests/{reply['id']}").status_code == 401
