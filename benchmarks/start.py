"""How long a user waits: from the command to the first token, and for ``--help``.

    python benchmarks/start.py [--runs 5] [serve options]

Each run starts ``mini-vllm serve`` as a fresh process on a free port, waits for its ready line, sends one ``/generate`` and
takes the time of the first byte of text. The first run is a warm-up (it may compile bytecode) and is shown apart. A table,
then one line of JSON.
"""

import argparse
import json
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request

PROGRAM = [sys.executable, "-m", "minivllm"]


def first_token_s(options: list[str]) -> tuple[float, float]:
    """Seconds from starting the process to its ready line, and to the first token."""
    began = time.monotonic()
    process = subprocess.Popen(
        [*PROGRAM, "serve", "--port", "0", *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        if process.stdout is None:
            raise RuntimeError("the process has no output")
        url = next(found.group(1) for line in process.stdout if (found := re.search(r"on (http://\S+)", line)))
        ready_s = time.monotonic() - began
        body = json.dumps({"prompt": "Once upon a time", "max_tokens": 8}).encode()
        with urllib.request.urlopen(urllib.request.Request(url + "/generate", body)) as reply:
            reply.read(1)
            return ready_s, time.monotonic() - began
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def help_s() -> float:
    """Seconds that ``--help`` takes."""
    began = time.monotonic()
    subprocess.run([*PROGRAM, "--help"], stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    args, options = parser.parse_known_args()
    warm_up = first_token_s(options)
    runs = [first_token_s(options) for _ in range(args.runs)]
    helps = [help_s() for _ in range(args.runs)]
    figures = {
        "ready_s": statistics.median(r for r, _ in runs),
        "first_token_s": statistics.median(t for _, t in runs),
        "first_token_max_s": max(t for _, t in runs),
        "warm_up_first_token_s": warm_up[1],
        "help_s": statistics.median(helps),
    }
    for name, value in figures.items():
        print(f"{name:<24}{value:8.2f}")
    print(json.dumps({**figures, "runs": args.runs, "options": options}))


if __name__ == "__main__":
    main()
