"""Every row of one model, in order, within a time budget: start, offline, serving, then what the GPU does in a step.

    python -m benchmarks.gpu.run [--model A] [--budget 480] [--parts start,offline,serving,trace] [--out FILE]
                                 [--option NAME=VALUE ...]

Each part is a process of its own, so that the card's memory is free for the next, and has what is left of the budget; what it
had measured when the time was over counts. Kernels are compiled into one folder of caches, new for each run: where ``start``
is the first part, the others find what it left. All records end up in one file, ``--out``, and one table is printed last.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from benchmarks.gpu.serving import REPOSITORY
from benchmarks.gpu.shapes import MODELS, add_common
from benchmarks.gpu.start import environment_of
from benchmarks.gpu.table import RecordFile, read_records, table

PARTS: Final[Mapping[str, Sequence[str]]] = {
    "start": (),
    "offline": (),
    "serving": (),
    "trace": ("--rows", "1,32,256", "--kernels", "12"),
}
LEAST_S: Final = 20.0  # a part is not begun with less
END_S: Final = 15.0  # for a part that was told to stop


def run_part(command: Sequence[str], limit_s: float, caches: Path) -> str:
    """Run one part with everything that it starts; returns what went wrong, or nothing."""
    environment = {**os.environ, **environment_of(caches)}
    process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, env=environment)
    try:
        status = process.wait(limit_s)
        return f"ended with status {status}" if status else ""
    except subprocess.TimeoutExpired:
        return f"stopped after {limit_s:.0f} s"
    finally:
        for kind in (signal.SIGTERM, signal.SIGKILL):  # the part's own children too, a server among them
            try:
                os.killpg(process.pid, kind)
            except ProcessLookupError:
                break
            until_s = time.perf_counter() + END_S
            while time.perf_counter() < until_s and _group_lives(process):
                time.sleep(0.05)


def _group_lives(process: subprocess.Popen[bytes]) -> bool:
    """True while a process of the group runs."""
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def run_parts(args: argparse.Namespace, folder: Path, caches: Path) -> tuple[list[Path], list[str]]:
    """Run what was asked for; returns the files of records and what went wrong."""
    begin_s = time.perf_counter()
    files, said = [], []
    for part in args.parts.split(","):
        left_s = args.budget - (time.perf_counter() - begin_s)
        if left_s < LEAST_S:
            said.append(f"{part}: no time left")
            continue
        file = folder / f"{args.model}-{part}.part"
        file.unlink(missing_ok=True)
        files.append(file)
        flags = ["--model", args.model, "--models-folder", str(args.models_folder), "--out", str(file), *PARTS[part]]
        flags += [text for option in args.option for text in ("--option", option)]
        flags += ["--caches", str(caches)] if part == "start" and not any(caches.iterdir()) else []
        print(f"--- {part} ({left_s:.0f} s left)", flush=True)
        if wrong := run_part([sys.executable, "-m", f"benchmarks.gpu.{part}", *flags], left_s, caches):
            said.append(f"{part}: {wrong}")
    return files, said


def main() -> None:
    """Run the parts and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    parser.add_argument("--budget", type=float, default=480.0, metavar="SECONDS")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, and in which order")
    args = parser.parse_args()
    if unknown := [part for part in args.parts.split(",") if part not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    out: Path = (args.out or Path("build/bench-gpu") / f"{args.model}.jsonl").resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    MODELS[args.model].folder(args.models_folder)
    begin_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as caches:
        files, said = run_parts(args, out.parent, Path(caches))
    file = RecordFile(out)
    for record in read_records(files):
        file.keep(record)
    file.keep({"part": "run", "model": args.model, "wall_s": time.perf_counter() - begin_s, "said": said})
    for path in files:
        path.unlink(missing_ok=True)
    print("---", *said, table(file.records), sep="\n")


if __name__ == "__main__":
    main()
