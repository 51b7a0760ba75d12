"""How tests wait for the page. Playwright's own ``wait_for_function`` needs eval, which the page's policy forbids."""

import time
from typing import Any


def until(page: Any, expression: str, timeout_s: float = 60.0) -> None:
    """Wait until a JavaScript expression is true on the page."""
    deadline = time.monotonic() + timeout_s
    while not page.evaluate(f"Boolean({expression})"):
        assert time.monotonic() < deadline, f"it did not become true: {expression}"
        page.wait_for_timeout(30)


def live(page: Any) -> None:
    """Wait until the page has the engine's state."""
    until(page, "document.querySelector('#status').textContent.trim() === 'live' && glass.state")


def wait_idle(page: Any) -> None:
    """Wait until every answer has ended and the page shows that nobody holds a block."""
    until(page, "document.querySelector('#stop').disabled && !glass.state.blocks.held.length")


def shown(page: Any, seq: int) -> None:
    """Wait until the page has drawn this record, as the last."""
    until(page, f"Number(document.documentElement.dataset.seq) === {seq}")


def mode(page: Any, name: str) -> None:
    """Wait until the page is live, paused or in replay."""
    until(page, f"document.documentElement.dataset.mode === {name!r}")
