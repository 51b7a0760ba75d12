"""Debian's Chromium without a window, driven by Playwright's library. Browsers of Playwright's own are not needed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# No GPU, no sandbox (containers and root have none), and nobody is asked for updates.
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip


def chromium_path() -> str | None:
    """Where Chromium is installed, or None."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser while the block runs. Raises ``FileNotFoundError`` where there is none."""
    from playwright.sync_api import sync_playwright

    path = chromium_path()
    if path is None:
        raise FileNotFoundError("no chromium is installed; on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


def watch(page: Any) -> list[str]:
    """What goes wrong on a page from now on: errors and warnings of its console, exceptions, violations of its policy."""
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(f"{error}\n{error.stack}"))
    return wrong
