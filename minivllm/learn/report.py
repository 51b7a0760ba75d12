"""The ladder as text: two tables (what it gave, what it cost) and the sentences between the rungs; plain, or as Markdown."""

from collections.abc import Sequence

from minivllm.learn.result import Ladder, RungResult
from minivllm.learn.steps import duration, ratio, size, steps

GAVE = ("rung", "", "tokens/s", "step", "predicted", "TTFT p50", "p99", "ITL p50", "p99", "same tokens")
COST = ("rung", "", "tokens computed", "again", "padding", "cached", "GFLOP", "cache moved", "wasted", "op/byte", "of the roof")


def headline(ladder: Ladder) -> tuple[str, ...]:
    """What was run, where, and what that can do."""
    m, w, f = ladder.machine, ladder.workload, ladder.model
    arrival = f"arriving at {w.request_rate:g} a second" if w.request_rate else "all there at once"
    kind = "random weights" if f.random else f.architecture
    rounds = f"; of {ladder.rounds} runs of each rung the fastest" if ladder.rounds > 1 else ""
    return (
        f"{f.name} ({kind}, {f.params / 1e6:,.3g} M parameters, {f.dtype}) on {m.device}, torch {m.torch}.",
        f"{w.num_requests} requests, {arrival}: {w.prefix_len} tokens of {w.num_prefixes} shared beginnings, then "
        f"about {w.input_len}, and about {w.output_len} to generate (±{w.spread:.0%}); up to {ladder.batch_size} side by "
        f"side{rounds}.",
        f"The machine's roofline: {m.flops_per_s / 1e9:,.0f} GFLOP/s and {m.bytes_per_s / 1e9:,.1f} GB/s, so arithmetic is the "
        f"limit from {m.ridge:.1f} operations for each byte on. A step reads {size(f.weight_bytes)} of weights; K and V of a "
        f"token are {size(f.kv_bytes)}.",
    )


def remarks(ladder: Ladder) -> tuple[str, ...]:
    """What must be known of the figures."""
    found = []
    for rung in ladder.rungs:
        if not rung.ran:
            found.append(f"Rung {rung.name} was left out: {rung.left_out}")
        elif rung.requests < ladder.workload.num_requests:
            cut = f" ({rung.cut} cut short after {2 * ladder.max_rung_s:g} s)" if rung.cut else ""
            found.append(
                f"Rung {rung.name} took no more requests after {ladder.max_rung_s:g} s: its figures are those of "
                f"{rung.requests} of {ladder.workload.num_requests}{cut}, and waiting times would be longer with all of them."
            )
        if rung.agreement.different:
            found.append(
                f"Rung {rung.name} gave other texts for {rung.agreement.different} of {rung.agreement.compared} requests."
            )
    if widest := max(rung.agreement.widest for rung in ladder.ran):
        found.append(f"Where texts part, the logits of both tokens are within {widest:.1g} of the best one.")
    return tuple(found)


def table(ladder: Ladder) -> str:
    """Everything, for a terminal."""
    lines = [*headline(ladder), "", *_plain(GAVE, gave_rows(ladder)), "", *_plain(COST, cost_rows(ladder)), ""]
    for step in steps(ladder):
        lines += [f"{step.below.name} → {step.above.name}  {step.above.idea}", *(f"    {text}" for text in step.sentences)]
    return "\n".join([*lines, *(["", *remarks(ladder)] if remarks(ladder) else [])])


def markdown(ladder: Ladder) -> str:
    """Everything, for a page."""
    lines = [*headline(ladder), "", *_marked(GAVE, gave_rows(ladder)), "", *_marked(COST, cost_rows(ladder)), ""]
    lines += [
        f"* **{step.below.name} → {step.above.name}, {step.above.title}.** {step.above.idea} {' '.join(step.sentences)}"
        for step in steps(ladder)
    ]
    return "\n".join([*lines, *(["", *remarks(ladder)] if remarks(ladder) else [])])


def gave_rows(ladder: Ladder) -> list[list[str]]:
    """Rows of the first table."""
    ups = {step.above.name: step for step in steps(ladder)}
    rows = []
    for r in ladder.ran:
        up, a = ups.get(r.name), r.agreement
        same = "" if not a.compared else f"{a.equal} of {a.compared}" + (f", {a.near_ties} near-ties" if a.near_ties else "")
        step = (ratio(up.measured), ratio(up.predicted)) if up else ("", "")
        times = (r.ttft_s.p50, r.ttft_s.p99, r.itl_s.p50, r.itl_s.p99)
        rows.append([r.name, r.title, f"{r.tokens_per_s:,.1f}", *step, *map(duration, times), same])
    return rows


def cost_rows(ladder: Ladder) -> list[list[str]]:
    """Rows of the second table. Rungs that served a part only are counted for that part."""
    return [_cost(rung) for rung in ladder.ran]


def _cost(r: RungResult) -> list[str]:
    """A rung's row of it."""
    c = r.cost
    counts = [f"{n:,}" if n else "" for n in (c.tokens, r.recomputed, c.padding, r.found)]
    cache = [size(n) if n else "" for n in (c.kv_bytes, c.kv_padding_bytes)]
    operations = f"{c.flops / 1e9:,.0f}" if c.flops >= 1e11 else f"{c.flops / 1e9:.3g}"
    roof = f"{r.predicted_s / r.elapsed_s:.0%}"
    return [r.name, r.title, *counts, operations, *cache, f"{r.intensity:.1f}", roof]


def _plain(head: Sequence[str], rows: list[list[str]]) -> list[str]:
    """Columns for a terminal: words to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [list(head), *rows]) for i in range(len(head))]
    pads = [str.ljust if i < 2 else str.rjust for i in range(len(head))]
    return ["  ".join(p(cell, w) for p, cell, w in zip(pads, row, widths, strict=True)).rstrip() for row in [list(head), *rows]]


def _marked(head: Sequence[str], rows: list[list[str]]) -> list[str]:
    """The same in Markdown."""
    rule = ["---" if i < 2 else "---:" for i in range(len(head))]
    return ["| " + " | ".join(row) + " |" for row in [list(head), rule, *rows]]
