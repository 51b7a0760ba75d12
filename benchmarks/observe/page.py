"""Does the page keep up with a fast engine? And the pictures of it in the documentation.

    python -m benchmarks.observe.page
    python -m benchmarks.observe.page --screenshots docs/pictures

The first opens the page in a browser without a window, beside a server that makes 500 steps a second, and asks it over and over
which step it shows. The promise: never later than a second behind the engine, and no more memory the longer it runs. The lag is
taken from the outside: the time now less the time at which the engine was done with the step that is drawn, on one clock.
"""

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.observe.browser import chromium, watch

MOST_LAG_S = 1.0
REPO = Path(__file__).resolve().parents[2]
LONG = "Once upon a time there was a little fox who lived in a small house by the sea with her mother and father. " * 3
NOW = "(performance.timeOrigin + performance.now()) / 1000"  # unix time by a clock that does not jump


@contextmanager
def program(*command: str) -> Iterator[str]:
    """A server while the block runs; its address."""
    process = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True, cwd=REPO)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"Serving .* on (http://\S+)", line):
                yield found[1]
                return
        raise RuntimeError("the server did not come up")
    finally:
        process.kill()
        process.wait()


def is_live(page: Any) -> None:
    """Wait until the page shows steps."""
    while not page.evaluate("document.documentElement.dataset.at && window.glass.records.length > 0"):
        page.wait_for_timeout(50)


# ------------------------------------------------------------------------------------------------------------- keeping up


def measure(options: argparse.Namespace) -> int:
    """Watch the page for so many seconds; the exit code."""
    lags: list[float] = []
    pace = ("--steps-per-s", str(options.steps_per_s), "--rows", str(options.rows))
    with program("benchmarks.observe.paced_server", *pace) as url, chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        wrong = watch(page)
        page.goto(url)
        is_live(page)
        look = f"[{NOW}, Number(document.documentElement.dataset.seq), Number(document.documentElement.dataset.at)]"
        offset_s = time.time() - time.monotonic()
        page.wait_for_timeout(1000)
        began_s, first, _ = page.evaluate(look)
        heap = heap_bytes(page)
        while True:
            now_s, last, at_s = page.evaluate(look)
            lags.append(now_s - offset_s - at_s)
            if now_s - began_s >= options.seconds:
                break
            page.wait_for_timeout(100)
        frames = page.evaluate(
            "new Promise(done => { let n = 0; const end = performance.now() + 2000;"
            " (function count(t) { n++; t < end ? requestAnimationFrame(count) : done(n / 2); })(performance.now()); })"
        )
        kept, more = page.evaluate("glass.records.length"), heap_bytes(page)
    lags.sort()
    told = [
        ("steps a second", (last - first) / (now_s - began_s)), ("rows a step", float(options.rows)),
        ("lag, median", lags[len(lags) // 2]), ("lag, p99", lags[int(0.99 * (len(lags) - 1))]), ("lag, longest", lags[-1]),
        ("frames a second", frames), ("records kept", kept), ("heap at first, MB", heap / 1e6),
        ("heap at last, MB", more / 1e6),
    ]  # fmt: skip
    for name, value in told:
        print(f"{name:<20} {value:10.3f}")
    broken = [f"it was {lags[-1]:.2f} s behind"] if lags[-1] > MOST_LAG_S else []
    if (last - first) / (now_s - began_s) < 0.9 * options.steps_per_s:
        broken.append("the server did not make the steps that were asked for; this machine is busy")
    for line in broken + wrong:
        print("BROKEN:", line)
    return 1 if broken or wrong else 0


def heap_bytes(page: Any) -> int:
    """What the page's objects take, after a collection."""
    session = page.context.new_cdp_session(page)
    session.send("HeapProfiler.collectGarbage")
    return int(session.send("Runtime.getHeapUsage")["usedSize"])


# --------------------------------------------------------------------------------------------------------------- pictures


def picture(page: Any, folder: Path, name: str) -> None:
    """The page as it is now."""
    page.screenshot(path=folder / f"page-{name}.png")
    print(folder / f"page-{name}.png", f"{(folder / f'page-{name}.png').stat().st_size / 1000:.0f} kB")


# In the page, so that it happens at the very step: [after so many steps, which eight to send, tokens of each]; the picture
# holds still when the last number of steps is reached, or so many after somebody was preempted.
SCENE = """async ([sends, last, preempted]) => {
    const seq = () => Number(document.documentElement.dataset.seq), first = seq(), $ = (id) => document.querySelector(id);
    const reached = async (there) => { while (!there()) await new Promise((go) => setTimeout(go, 2)); };
    for (const [after, which, tokens] of sends) {
        await reached(() => seq() >= first + after);
        $("#which").value = which;
        $("[name=max_tokens]").value = tokens;
        $("#eight").click();
    }
    const gaveWay = (r) => r.seq > first && r.preempted.length;
    await reached(() => seq() >= first + last || glass.records.slice(0, -preempted).some(gaveWay));
    window.requestAnimationFrame = () => 0;
}"""


def scene(page: Any, *sends: tuple[int, str, int], last: int, preempted: int = 1000) -> None:
    """Send eights at certain steps, and hold the picture at another."""
    page.evaluate(SCENE, [[list(one) for one in sends], last, preempted])


def idle(page: Any) -> None:
    """Wait until nothing runs."""
    while not page.evaluate("document.querySelector('#stop').disabled && !glass.state.blocks.held.length"):
        page.wait_for_timeout(50)


def seek(page: Any, at: int) -> None:
    """Go to a step of what is replayed."""
    page.evaluate(
        "at => { const s = document.querySelector('#seek'); s.value = at; s.dispatchEvent(new Event('input')); }", at
    )
    page.wait_for_timeout(300)


def look_at_shared(page: Any) -> None:
    """Click on the block that most requests share."""
    held = page.evaluate("glass.state.blocks.held")
    block = max(held, key=lambda one: len(one[2]))[1]
    page.focus("#kv")
    page.keyboard.press("Home")
    for _ in range(block - 1):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")


def screenshots(folder: Path) -> int:
    """All pictures, of the bundled model."""
    folder.mkdir(parents=True, exist_ok=True)
    recording = folder / "page.rec"
    with chromium() as browser:

        def visit(url: str, width: int = 1280, height: int = 800, **context: Any) -> Any:
            context = {"viewport": {"width": width, "height": height}, "reduced_motion": "reduce", **context}
            page = browser.new_context(**context).new_page()
            page.goto(url)
            page.wait_for_timeout(1000)
            idle(page)
            return page

        with serving(140, "--record-steps", str(recording)) as url:
            page = visit(url)
            scene(page, (0, "many", 44), (1, "same", 120), last=66)
            picture(page, folder, "light")
            page = visit(url, 380, 780, device_scale_factor=2, has_touch=True, is_mobile=True)
            page.evaluate("document.querySelector('#eight').scrollIntoView()")
            scene(page, (0, "many", 80), last=19)
            picture(page, folder, "phone")
            page = visit(url)
            page.fill("#prompt", LONG)
            page.select_option("#which", "same")
            page.click("#eight")
            idle(page)
            page.click("#pause")
            seek(page, page.evaluate("glass.records.findLastIndex((r) => r.rows.length > 7)") - 20)
            look_at_shared(page)
            picture(page, folder, "kv")
            page = visit(url)
            page.set_input_files("#file", recording)
            page.wait_for_timeout(1500)
            seek(page, 52)
            page.focus("#batch")
            page.keyboard.press("End")
            page.keyboard.press("Enter")
            picture(page, folder, "replay")
        with serving(58) as url:  # too few blocks: somebody has to give way
            page = visit(url, color_scheme="dark")
            scene(page, (0, "many", 110), (1, "same", 110), last=150, preempted=16)
            picture(page, folder, "dark")
    recording.unlink()
    return 0


def serving(num_blocks: int, *more: str) -> Any:
    """A server of the bundled model with a small cache; its address."""
    small = ("--num-gpu-blocks-override", str(num_blocks), "--max-num-seqs", "12", "--max-num-batched-tokens", "64")
    return program("minivllm", "serve", "--port", "0", "--log-level", "warning", *small, *more)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or take pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps-per-s", type=float, default=500.0)
    parser.add_argument("--rows", type=int, default=16, help="most sequences in a step")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--screenshots", type=Path, help="write pictures into this folder instead")
    options = parser.parse_args(arguments)
    return screenshots(options.screenshots) if options.screenshots else measure(options)


if __name__ == "__main__":
    sys.exit(main())
