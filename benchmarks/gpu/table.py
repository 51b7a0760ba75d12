"""What is to be reached on one H100 80GB, beside what was measured.

    python -m benchmarks.gpu.table FILE.jsonl ...          the table of all records in the files

vLLM's figures are of 0.25.1 with its defaults, taken on the same kind of card (H100 80GB HBM3, torch 2.11, random weights,
bf16); the limits are estimates from the bytes that must move and the operations that must be done. A record is one line of
JSON: ``{"row": "3", "model": "A", "value": 0.9, ...}``; the later of two for one row counts.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Figures:
    """One row's figures for one model; None where there is none."""

    vllm: tuple[float, ...]  # one, or the lowest and the highest seen
    limit: float | None
    goal: float
    stretch: float | None = None


@dataclass(frozen=True)
class Target:
    """One row: what is measured and what is to be reached, by model."""

    what: str
    unit: str
    more_is_better: bool
    by_model: Mapping[str, Figures]


def _tokens(what: str, **by_model: Figures) -> Target:
    return Target(what, "tok/s", True, by_model)


def _ms(what: str, a: Figures, b: Figures) -> Target:
    return Target(what, "ms", False, {"A": a, "B": b})


def _s(what: str, a: Figures, b: Figures) -> Target:
    return Target(what, "s", False, {"A": a, "B": b})


F = Figures
TARGETS: Final[Mapping[str, Target]] = {
    "1": _tokens("256 sequences", A=F((18_700,), 26_000, 22_000, 24_000), B=F((8_150,), 9_900, 8_800, 9_200)),
    "2": _tokens("1,024 sequences", A=F((17_140,), 25_000, 20_500, 23_000)),
    "3": _ms("decode step, batch 1", F((2.00, 2.31), 0.41, 0.95), F((6.49,), 5.02, 5.8)),
    "4": _ms("decode step, batch 8", F((2.00, 2.41), 0.48, 1.15), F((6.65,), 5.1, 6.1)),
    "5": _ms("decode step, batch 32", F((3.1,), 0.72, 1.6), F((7.13,), 5.4, 6.6)),
    "6": _ms("decode step, batch 128", F((4.6, 5.1), 1.65, 2.6), F((9.12,), 6.4, 8.2)),
    "7": _ms("decode step, batch 256", F((7.0, 7.3), 2.9, 4.0), F((12.3,), 7.9, 10.5)),
    "8": _tokens("prefill 64 x 1,024", A=F((323_800,), 600_000, 420_000), B=F((43_200,), 48_000, 44_500)),
    "9": _ms("one prompt of 1,024", F((29.3,), 3, 5), F((31.7,), 23, 26)),
    "10": _ms("one prompt of 8,192", F((49.6,), 28, 36), F((220,), 200, 212)),
    "11": _ms("one prompt of 32,768", F((303,), 250, 290), F((1_196,), 1_130, 1_180)),
    "12": _s("shared prefix, empty cache", F((1.22,), None, 0.95, 0.75), F((2.04,), None, 1.75)),
    "13": _s("shared prefix, cached", F((1.13,), None, 0.9, 0.6), F((1.78,), None, 1.5)),
    "14": _s("start, empty caches", F((111.6,), None, 15), F((115.8,), None, 18)),
    "15": _s("second start", F((40.7,), None, 7), F((38.0,), None, 9)),
    "16 ttft p50": _ms("8 req/s, TTFT p50", F((31,), None, 8), F((35,), None, 25)),
    "16 ttft p99": _ms("8 req/s, TTFT p99", F((67,), None, 20), F((76,), None, 45)),
    "17 ttft p99": _ms("32 req/s, TTFT p99", F((97,), None, 30), F((108,), None, 80)),
    "17 itl p50": _ms("32 req/s, ITL p50", F((2.8,), None, 1.6), F((8.7,), None, 8)),
    "17 itl p99": _ms("32 req/s, ITL p99", F((27,), None, 8), F((33,), None, 25)),
    "18 rate": _tokens("1,000 at once", A=F((12_400,), None, 18_000), B=F((6_130,), None, 6_800)),
    "18 itl p99": _ms("1,000 at once, ITL p99", F((90,), None, 60), F((414,), None, 150)),
}


def shown(value: float | None) -> str:
    """A figure with three digits that count."""
    if value is None:
        return "-"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def verdict(value: float, figures: Figures, more_is_better: bool) -> str:
    """Whether the goal is reached, and how ours stands to vLLM's better figure."""
    sign = 1 if more_is_better else -1
    best = max(figures.vllm) if more_is_better else min(figures.vllm)
    ratio = value / best if more_is_better else best / value
    beside = f"{ratio:.2f}x vLLM"
    if figures.stretch is not None and sign * value >= sign * figures.stretch:
        return f"stretch reached, {beside}"
    if sign * value >= sign * figures.goal:
        return f"reached, {beside}"
    return f"{abs(value / figures.goal - 1):.0%} {'under' if more_is_better else 'over'} the goal, {beside}"


def table(records: Iterable[Record]) -> str:
    """All measured rows, in the order of the targets."""
    found = {(r["model"], r["row"]): r for r in records if "row" in r}
    order = {row: i for i, row in enumerate(TARGETS)}
    lines = []
    for (model, row), record in sorted(found.items(), key=lambda pair: (pair[0][0], order.get(pair[0][1], len(order)))):
        target = TARGETS.get(row)
        figures = None if target is None else target.by_model.get(model)
        name = (model, row, "" if target is None else target.what, "" if target is None else target.unit)
        if "value" not in record:
            lines.append((*name, "failed", "", "", "", str(record.get("error", ""))[:60]))
        elif target is None or figures is None:
            lines.append((*name, shown(record["value"]), "-", "-", "-", ""))
        else:
            vllm = "-".join(shown(v) for v in figures.vllm)
            said = verdict(record["value"], figures, target.more_is_better)
            lines.append((*name, shown(record["value"]), vllm, shown(figures.limit), shown(figures.goal), said))
    return aligned([("model", "row", "work", "unit", "ours", "vLLM", "limit", "goal", "verdict"), *lines])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as columns: numbers to the right, words to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.rjust(w) if c[:1].isdigit() else c.ljust(w) for c, w in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


class RecordFile:
    """Where records go: each is on disk as soon as it is measured, so that a program that is stopped loses none. Written by
    the program that measures."""

    def __init__(self, path: Path | None, **common: Any) -> None:
        """``common``: fields of every record."""
        self.records: list[dict[str, Any]] = []
        self._common = common
        self._file: TextIO | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8")

    def keep(self, record: Record) -> None:
        """Keep one record."""
        self.records.append({**self._common, **record})
        if self._file is not None:
            self._file.write(json.dumps(self.records[-1]) + "\n")
            self._file.flush()

    def add(self, **fields: Any) -> None:
        """Keep one record, and say it."""
        self.keep(fields)
        if "value" in fields:
            print(f"row {fields.get('row', '')}: {shown(fields['value'])}", flush=True)


def read_records(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """All records of the files that exist."""
    return [json.loads(line) for path in paths if path.is_file() for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Print the table of earlier measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    print(table(read_records(parser.parse_args().files)))


if __name__ == "__main__":
    main()
