"""A server with keys: the page opens for everybody and tells nothing; with a key it shows, and keeps the key to its tab."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from live_server import LiveServer, serve
from page_driver import live, until, wait_idle


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("ann open-sesame\n", encoding="utf-8")
    keys.chmod(0o600)
    with serve("--num-gpu-blocks-override", "200", "--api-key-file", str(keys)) as server:
        yield server


def send_with_the_key(page: Any) -> None:
    """Enter the key, and have an answer."""
    page.fill("#key", "open-sesame")
    page.keyboard.press("Enter")
    live(page)
    page.click("#send")
    until(page, "document.querySelector('#talk .text')?.textContent.length > 10")
    wait_idle(page)


def test_it_asks_for_a_key(visit: Callable[..., Any], locked: LiveServer) -> None:
    page = visit(locked.url, may_log="status of 401")
    page.wait_for_selector("#key-form:not([hidden])")
    until(page, "document.querySelector('#status').textContent.includes('needs an API key')")
    assert page.evaluate("[glass.state, glass.records.length]") == [None, 0]
    page.click("#send")
    page.wait_for_selector("#problem:not([hidden])")
    assert page.inner_text("#problem") == "This server asks for an API key; enter it above."
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("#key-form:not([hidden])")
    page.click("#send")
    page.wait_for_selector("#problem:not([hidden])")
    assert page.inner_text("#problem") == "The server does not know this API key; enter another one above."
    send_with_the_key(page)
    assert page.is_hidden("#problem") and page.is_hidden("#key-form") and page.input_value("#key") == ""
    assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    other = visit(locked.url, may_log="status of 401")  # another tab knows nothing of it
    other.wait_for_selector("#key-form:not([hidden])")


def test_prompts_are_not_told(visit: Callable[..., Any], locked: LiveServer) -> None:
    page = visit(locked.url, may_log="status of 401")
    page.wait_for_selector("#key-form:not([hidden])")
    send_with_the_key(page)
    assert page.evaluate("glass.records.some(r => r.rows.length)")
    assert not page.evaluate("glass.records.some(r => r.outputs.length || r.rows.some(row => row.tokens.length))")
    assert page.evaluate("glass.state.blocks.cached.length") > 0
    page.focus("#kv")
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    assert "Its tokens are not told" in page.inner_text("#looked")
