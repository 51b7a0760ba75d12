"""mini-vLLM on a CPU beside what people use there today: the same requests for each, in interleaved rounds.

    make bench-cpu ARGS="--llama-cpp FOLDER"            or     python -m benchmarks.cpu.run [options]

N requests of random token ids arrive at once and are answered greedily to their full length; the rate is output tokens over the
wall time from the first request to the last token, prompts included. Round 1 measures every contender at every N, then round 2
does, and so on: what changes on the machine over minutes meets all of them. A contender that is not installed is skipped with
the reason. What is written to the output folder: ``measurements.jsonl`` (one line a measurement, as they come), ``table.md``
and ``plot.png``.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cpu.contenders import CONTENDERS
from benchmarks.cpu.machine import BUSY_SHARE, CpuClock, await_quiet, describe_machine
from benchmarks.cpu.plot import draw
from benchmarks.cpu.rivals import REPOSITORY, Measurement, Rival, RivalFailed, Setting, is_importable
from benchmarks.cpu.shapes import SHAPES
from benchmarks.cpu.table import measured, page, read_records
from minivllm.bench.workload import Item, RandomShape, random_items

WARM_UP_OUTPUT = 4  # tokens a request
WARM_UP_ROUND = 0  # its prompts are no other round's
MAX_ATTEMPTS = 4


def workload(setting: Setting, num_requests: int, round_number: int, attempt: int = 0) -> list[Item]:
    """The requests of one measurement: the same for every contender, new in every round, size and attempt (no prefix is ever
    found in a cache)."""
    output_len = WARM_UP_OUTPUT if round_number == WARM_UP_ROUND else setting.output_len
    lengths = RandomShape(setting.prompt_len, output_len)
    seed = (round_number * MAX_ATTEMPTS + attempt) * 10_000 + num_requests
    return random_items(lengths, num_requests, setting.shape.vocab_size, setting.shape.avoided_ids, seed)


def digest(items: Sequence[Item]) -> str:
    """A short fingerprint of a workload, written beside each figure."""
    return hashlib.sha256(json.dumps([(i.prompt, i.max_tokens) for i in items]).encode()).hexdigest()[:16]


def figures(measured: Measurement) -> dict[str, Any]:
    """What a record says of a measurement; percentiles over requests (TTFT) and over all gaps (ITL)."""
    found: dict[str, Any] = {
        "output_tokens": measured.output_tokens,
        "duration_s": measured.duration_s,
        "tokens_per_s": measured.tokens_per_s,
    }
    for name, times_s in (("ttft", measured.ttft_s), ("itl", measured.itl_s)):
        for percent in (50, 99):
            found[f"{name}_p{percent}_ms"] = float(np.percentile(times_s, percent)) * 1e3 if times_s else None
    return found


def measure_quietly(rival: Rival, setting: Setting, num_requests: int, round_number: int) -> dict[str, Any]:
    """Measure when others leave the machine alone, and again if they came back meanwhile; the quietest attempt counts.

    Threads that wait for each other stand still together when a neighbour takes one core: such a figure says nothing of the
    contender. What decides is the neighbours' CPU time alone, never the figure.
    """
    attempts: list[dict[str, Any]] = []
    while len(attempts) < MAX_ATTEMPTS:
        items = workload(setting, num_requests, round_number, len(attempts))
        await_quiet(setting.quiet_wait_s)
        before = CpuClock.now()
        result = rival.run(items)
        share = before.others_share(CpuClock.now())
        attempts.append({"workload": digest(items), "others_share": share, **figures(result)})
        if share <= BUSY_SHARE:
            break
    return {**min(attempts, key=lambda a: a["others_share"]), "attempts": len(attempts)}


def measure_sizes(
    rival: Rival, setting: Setting, concurrency: Sequence[int], round_number: int, record: Callable[..., None]
) -> None:
    """One contender's part of a round: started, measured at every size, stopped. Raises ``RivalFailed``."""
    try:
        start_s = rival.start()
        for num_requests in sorted(concurrency):  # ascending: the peak of memory so far is the peak of this size
            rival.warm_up(workload(setting, num_requests, WARM_UP_ROUND))
            kept = measure_quietly(rival, setting, num_requests, round_number)
            record(num_requests=num_requests, start_s=start_s, peak_memory_bytes=rival.peak_memory_bytes(), **kept)
    finally:
        rival.stop()


def measure(
    rivals: Mapping[str, Rival],
    setting: Setting,
    concurrency: Sequence[int],
    rounds: int,
    write: Callable[[dict[str, Any]], None],
) -> None:
    """All rounds. A contender that fails is recorded with its error, and tried again in the next round."""
    machine, commit = describe_machine(), current_commit()
    versions: dict[str, Mapping[str, str]] = {}
    for round_number in range(1, rounds + 1):
        for name, rival in rivals.items():
            about = {
                "contender": name,
                "label": rival.label,
                "round": round_number,
                "shape": setting.shape.name,
                "prompt_len": setting.prompt_len,
                "output_len": setting.output_len,
                "threads": setting.threads,
                "machine": machine,
                "commit": commit,
            }

            def record(about: dict[str, Any] = about, rival: Rival = rival, **found: Any) -> None:
                if rival.label not in versions:
                    versions[rival.label] = rival.versions()
                at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                write({**about, **found, "versions": versions[rival.label], "at": at})

            try:
                measure_sizes(rival, setting, concurrency, round_number, record)
            except RivalFailed as failure:
                write({**about, "error": str(failure)})


def current_commit() -> str:
    """The checkout's commit, with "+" when files differ from it; empty outside a checkout."""
    try:
        told = [
            subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return ""
    return told[0] + ("+" if told[1] else "")


def numbers(text: str) -> list[int]:
    """Whole numbers above 0, written with commas."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError("numbers must be at least 1")
    return found


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    scratch = Path(tempfile.gettempdir()) / "mini-vllm-bench-cpu"
    parser.add_argument("--shape", choices=sorted(SHAPES), default="gpt2", help="the model's shape (default: gpt2)")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="who, with commas (default: %(default)s)")
    parser.add_argument("--concurrency", type=numbers, default=[1, 4, 8, 16, 32], help="N, with commas (default: 1,4,8,16,32)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: one per core")
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument(
        "--quiet-wait", type=float, default=60.0, metavar="S", help="longest wait for a quiet machine (default: %(default)g s)"
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench-cpu"), help="folder of the results (%(default)s)")
    parser.add_argument("--models", type=Path, default=scratch, help="folder in which model files are made (%(default)s)")
    parser.add_argument("--llama-cpp", type=Path, help="folder of llama.cpp's programs (default: those on PATH)")
    parser.add_argument("--report-only", action="store_true", help="measure nothing; make table and picture of --out anew")
    args = parser.parse_args(arguments)
    if unknown := set(args.contenders.split(",")) - set(CONTENDERS):
        parser.error(f"there is no contender {', '.join(sorted(unknown))}; there are {', '.join(CONTENDERS)}")
    return args


def present_rivals(names: Sequence[str], setting: Setting) -> dict[str, Rival]:
    """The contenders that can run here; says of the others why not."""
    rivals = {}
    for name in names:
        rival = CONTENDERS[name](setting)
        if reasons := rival.missing():
            print(f"skipped {name}: {'; '.join(reasons)}", file=sys.stderr)
        else:
            rivals[name] = rival
    return rivals


def say(record: Mapping[str, Any]) -> None:
    """A line about a measurement while the next one runs."""
    what = f"round {record['round']}  {record['contender']:<24}"
    if "error" in record:
        print(f"{what}failed: {record['error']}", file=sys.stderr, flush=True)
        return
    print(
        f"{what}N={record['num_requests']:<4}{record['tokens_per_s']:7.1f} tok/s  others used {record['others_share']:.0%}",
        file=sys.stderr,
        flush=True,
    )


def main() -> None:
    """Measure and report."""
    args = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that a contender is stopped then too
    args.out.mkdir(parents=True, exist_ok=True)
    lines = args.out / "measurements.jsonl"
    if not args.report_only:
        setting = Setting(
            shape=SHAPES[args.shape],
            models=args.models.resolve(),
            logs=args.out.resolve(),
            llama_cpp=args.llama_cpp,
            threads=args.threads,
            max_concurrency=max(args.concurrency),
            prompt_len=args.prompt_len,
            output_len=args.output_len,
            quiet_wait_s=args.quiet_wait,
        )
        rivals = present_rivals(args.contenders.split(","), setting)
        with lines.open("w", encoding="utf-8") as file:

            def write(record: dict[str, Any]) -> None:
                print(json.dumps(record), file=file, flush=True)
                say(record)

            measure(rivals, setting, args.concurrency, args.rounds, write)
    records = read_records(lines)
    report = page(records)
    (args.out / "table.md").write_text(report, encoding="utf-8")
    print(report)
    if not measured(records):
        return
    if is_importable("matplotlib"):
        draw(records, args.out / "plot.png")
    else:
        print("no picture: matplotlib is not installed; pip install matplotlib", file=sys.stderr)


if __name__ == "__main__":
    main()
