"""``mini-vllm learn``: the same requests on every rung of the ladder, from no cache to overlapped steps, measured.

It prints a table and writes ladder.json, ladder.html and, where matplotlib is installed, ladder.png. ``--from`` makes the table
and the pictures anew from a ladder.json, which may come from another machine.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from minivllm.cli.bench import _count, _count0
from minivllm.cli.options import Parser, add_config, read_config
from minivllm.config import options
from minivllm.errors import InvalidOption

if TYPE_CHECKING:
    from minivllm.learn.result import Ladder

# Of the engine's options, those that all rungs can share.
SHARED: Final = ("model", "revision", "download_dir", "load_format", "dtype", "seed", "device", "num_threads")
OUTPUT: Final = "ladder"  # the folder's name, and the files'


def run(argv: Sequence[str]) -> int:
    """Run the ladder, or draw one that was run."""
    found = _parser().read(argv)
    if found.source is not None:
        from minivllm.learn.result import read

        source = Path(found.source)
        ladder, folder, stem = read(source), Path(found.output) if found.output else source.parent, source.stem
    else:
        folder, stem = Path(found.output or OUTPUT), OUTPUT
        ladder = _climb(found, folder)
    from minivllm.learn.report import markdown, table

    sys.stdout.write((markdown(ladder) if found.markdown else table(ladder)) + "\n")
    _draw(ladder, folder, stem)
    return 0


def _parser() -> Parser:
    """The command's options."""
    from minivllm.learn.workload import Workload

    parser = Parser("learn", "One workload on every rung of the ladder, measured here. --dtype auto means float32.")
    ladder = parser.add_argument_group("ladder")
    ladder.add_argument("--rungs", default="0-8", metavar="LIST", help="such as 0,3-5 [0-8]")
    ladder.add_argument("--output", metavar="DIR", help=f"where the report is written [{OUTPUT}; with --from: beside it]")
    ladder.add_argument("--from", dest="source", metavar="FILE", help="draw this ladder.json again; nothing is run")
    ladder.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    ladder.add_argument("--batch-size", type=_count, default=8, metavar="N", help="most requests side by side [8]")
    ladder.add_argument("--chunk-tokens", type=_count, default=64, metavar="N", help="prompt tokens a step, from rung 6 [64]")
    ladder.add_argument(
        "--max-rung-seconds", type=float, default=20.0, metavar="S", help="after these a rung takes no more requests [20]"
    )
    ladder.add_argument("--rounds", type=_count, default=1, metavar="N", help="runs of each rung, the fastest counts [1]")
    group = parser.add_argument_group("workload")
    plain = Workload()
    for name, kind, text in (
        ("num_requests", _count, "requests in all"),
        ("num_prefixes", _count, "different beginnings, which requests have in turn"),
        ("prefix_len", _count0, "tokens of each beginning"),
        ("input_len", _count, "tokens behind it, on average"),
        ("output_len", _count, "tokens to generate, on average"),
        ("spread", float, "by which share lengths vary"),
        ("request_rate", float, "arrivals per second, evenly spaced; 0: all at once"),
    ):
        default = getattr(plain, name)
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, type=kind, default=default, metavar="N", help=f"{text} [{default:g}]")
    add_config(parser, ("model", "runner"), frozenset(o.name for o in options() if o.name not in SHARED))
    return parser


def _climb(found: argparse.Namespace, folder: Path) -> "Ladder":
    """Check the options, then run the rungs."""
    from minivllm.learn.result import write
    from minivllm.learn.rungs import chosen
    from minivllm.learn.workload import Workload

    rungs = chosen(found.rungs)
    config = read_config(found)
    if not found.max_rung_seconds > 0:
        raise InvalidOption(f"--max-rung-seconds must be a number over 0, got {found.max_rung_seconds:g}.")
    names = [f.name for f in fields(Workload) if f.name != "seed"]
    workload = Workload(**{name: getattr(found, name) for name in names}, seed=config.model.seed)
    shared: dict[str, Any] = {o.name: getattr(getattr(config, o.section), o.name) for o in options() if o.name in SHARED}
    if config.model.dtype == "auto":
        shared["dtype"] = "float32"  # in which tokens can be compared
    from minivllm.door import locate

    locate(config)  # a mistyped folder is told before torch is loaded
    from minivllm.learn.ladder import Settings, run

    settings = Settings(found.batch_size, found.chunk_tokens, found.max_rung_seconds, found.rounds)
    ladder = run(shared, workload, settings, rungs, lambda line: print(line, file=sys.stderr, flush=True))
    write(ladder, folder / f"{OUTPUT}.json")
    return ladder


def _draw(ladder: "Ladder", folder: Path, stem: str) -> None:
    """Write the page and, if that can be had, the picture."""
    from minivllm.learn.page import page
    from minivllm.learn.result import write_file

    write_file(folder / f"{stem}.html", page(ladder).encode())
    written = f"{stem}.html"
    try:
        from minivllm.learn.picture import draw
    except ImportError:
        sys.stderr.write(f"There is no {stem}.png: matplotlib is not installed (pip install 'mini-vllm[learn]').\n")
    else:
        draw(ladder, folder / f"{stem}.png")
        written += f", {stem}.png"
    sys.stderr.write(f"{folder}: {written}\n")
