"""From measurements to a page: medians of the rounds, and the span they came from.

Works on records, the JSON lines of ``run.py``, so a page can be made again from a file. One record is one contender at one
concurrency in one round; a record with ``error`` is a contender that failed there. A measurement during which others used the
machine counts only where a contender has no other at that concurrency, and is marked there: what is left out is decided by the
neighbours' CPU time, never by the figure.
"""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cpu.contenders import QUOTED, QUOTED_MACHINE, QUOTED_SHAPE
from benchmarks.cpu.machine import BUSY_SHARE

Record = Mapping[str, Any]
MIB = 2**20


def read_records(path: Path) -> list[Record]:
    """The records of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def measured(records: Iterable[Record]) -> list[Record]:
    """Records that hold a measurement."""
    return [r for r in records if "error" not in r]


def is_disturbed(record: Record) -> bool:
    """True when others used the machine meanwhile."""
    return bool(record["others_share"] > BUSY_SHARE)


def counted(records: Iterable[Record]) -> list[Record]:
    """The measurements that count: the undisturbed ones, or all of a contender at a concurrency where none was undisturbed."""
    good = measured(records)
    quiet = {(r["label"], r["num_requests"]) for r in good if not is_disturbed(r)}
    return [r for r in good if not is_disturbed(r) or (r["label"], r["num_requests"]) not in quiet]


def mark(records: Sequence[Record], label: str, *num_requests: int) -> str:
    """A star for figures that come from disturbed measurements."""
    return "*" if any(is_disturbed(r) for r in records if r["label"] == label and r["num_requests"] in num_requests) else ""


def labels(records: Sequence[Record]) -> list[str]:
    """Contenders in the order of their first record."""
    return list(dict.fromkeys(r["label"] for r in records))


def sizes(records: Sequence[Record]) -> list[int]:
    """Concurrencies, in ascending order."""
    return sorted({r["num_requests"] for r in records})


def values(records: Sequence[Record], label: str, num_requests: int | None, key: str) -> list[float]:
    """A figure in every round; records that lack it (the contender cannot say) are left out."""
    return [
        r[key]
        for r in records
        if r["label"] == label and num_requests in (None, r["num_requests"]) and r.get(key) is not None
    ]


def spread(found: Sequence[float], digits: int = 0) -> str:
    """The median, and behind it the lowest and highest when there are several."""
    if not found:
        return ""
    middle = f"{statistics.median(found):.{digits}f}"
    return middle if len(found) == 1 else f"{middle} ({min(found):.{digits}f}-{max(found):.{digits}f})"


def rows_text(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; the first column is text, the others are figures."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def throughput_table(records: Sequence[Record]) -> str:
    """Output tokens/s by concurrency, peak memory at the largest, start; then the quoted ones."""
    columns = sizes(records)
    rows = []
    for label in labels(records):
        peaks = values(records, label, columns[-1], "peak_memory_bytes")
        starts = set(values(records, label, None, "start_s"))  # one a round
        cells = [spread(values(records, label, n, "tokens_per_s")) + mark(records, label, n) for n in columns]
        rows.append([label, *cells, spread([p / MIB for p in peaks]), spread(sorted(starts), 1)])
    if quoted_apply(records):
        for quoted in QUOTED:
            cells = [f"{quoted.tokens_per_s[n]:g}" if n in quoted.tokens_per_s else "" for n in columns]
            peak = f"{quoted.peak_mib:g}" if quoted.peak_mib is not None and columns[-1] == 32 else ""
            rows.append([f"{quoted.label} (quoted)", *cells, peak, quoted.start_s])
    header = ["output tokens/s", *(f"N={n}" for n in columns), f"peak MiB at {columns[-1]}", "start s"]
    return rows_text(header, rows)


def quoted_apply(records: Sequence[Record]) -> bool:
    """True when the quoted figures are of this workload."""
    return all((r["shape"], r["prompt_len"], r["output_len"]) == QUOTED_SHAPE for r in records)


def latency_table(records: Sequence[Record]) -> str:
    """Median and 99th percentile of TTFT and ITL, of the contenders that can say them."""
    columns = sizes(records)
    rows = []
    for label in labels(records):
        for metric in ("ttft", "itl"):
            cells = []
            for n in columns:
                middle, worst = (values(records, label, n, f"{metric}_{p}_ms") for p in ("p50", "p99"))
                found = f"{statistics.median(middle):.0f} / {statistics.median(worst):.0f}" if middle else ""
                cells.append(found + mark(records, label, n) if found else "")
            if any(cells):
                rows.append([f"{label}, {metric.upper()}", *cells])
    return rows_text(["p50 / p99, ms", *(f"N={n}" for n in columns)], rows)


def speedup_table(records: Sequence[Record], base: int = 1, batches: Sequence[int] = (8, 32)) -> str:
    """How many times the output of one request a batch gives: ratios of medians."""
    rows = []
    for label in labels(records):
        alone = values(records, label, base, "tokens_per_s")
        cells = []
        for n in batches:
            together = values(records, label, n, "tokens_per_s")
            ratio = f"{statistics.median(together) / statistics.median(alone):.1f}" if alone and together else ""
            cells.append(ratio + mark(records, label, base, n) if ratio else "")
        if any(cells):
            rows.append([label, *cells])
    return rows_text(["times one request's", *(f"batch of {n}" for n in batches)], rows)


def page(records: Sequence[Record]) -> str:
    """The whole report in markdown."""
    good, kept = measured(records), counted(records)
    if not good:
        return "Nothing was measured.\n"
    first = good[0]
    machine, rounds = first["machine"], len({r["round"] for r in good})
    versions = sorted({f"{name} {number}" for r in good for name, number in r["versions"].items()})
    parts = [
        f"# {first['shape']}: {first['prompt_len']} prompt + {first['output_len']} output tokens, N requests at once",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:g} GiB; {first['threads']} threads. "
        f"Interleaved rounds: {rounds}; medians (lowest-highest). {', '.join(versions)}.",
        throughput_table(kept),
    ]
    if quoted_apply(kept):
        parts.append(f"Quoted: measured elsewhere, on {QUOTED_MACHINE}.")
    if num_disturbed := sum(is_disturbed(r) for r in good):
        parts.append(
            f"{num_disturbed} of {len(good)} measurements were disturbed: others used more than {BUSY_SHARE:.0%} of the cores. "
            "They are left out, except where there is no other (*)."
        )
    if any(values(kept, label, None, "ttft_p50_ms") for label in labels(kept)):
        parts += ["## Time to first token, time between tokens", latency_table(kept)]
    if {1, 8, 32} & set(sizes(kept)) > {1}:
        parts += ["## What batching gives", speedup_table(kept)]
    failed = [f"- {r['label']}, round {r['round']}: {r['error']}" for r in records if "error" in r]
    if failed:
        parts += ["## Failed", "\n".join(failed)]
    return "\n\n".join(parts) + "\n"
