"""The ladder as one PNG, for pages that hold no HTML. Needs matplotlib (the extra ``learn``)."""

from io import BytesIO
from math import log10
from pathlib import Path
from typing import Any, Final

import matplotlib
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter
from PIL import Image

from minivllm.learn.page import colour_of, shares_of
from minivllm.learn.report import headline
from minivllm.learn.result import Ladder, RungResult, write_file
from minivllm.learn.steps import duration, ratio, size, steps

# Okabe and Ito's colours, which people with any kind of colour vision tell apart.
COLOURS: Final = {"plain": "#7d8ba0", "engine": "#0072b2", "needed": "#0072b2", "again": "#d55e00", "padding": "#e69f00"}
NUM_COLOURS: Final = 96  # of the file: a third of the size, and nobody sees it
FIRST, NEXT, INK, SOFT, RULE = "#0072b2", "#d55e00", "#17202b", "#5b6776", "#dde2e9"


def draw(ladder: Ladder, path: Path) -> None:
    """Write the picture; raises ``InvalidOption``."""
    matplotlib.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.edgecolor": RULE})
    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12)
    figure = Figure(figsize=(15, 2.6 + 0.74 * len(ladder.ran)), layout=layout)
    grid = figure.add_gridspec(2, 6)
    _rate(figure.add_subplot(grid[0, :3]), ladder)
    _waits(figure.add_subplot(grid[0, 3:]), ladder)
    _shares(figure.add_subplot(grid[1, :2]), ladder)
    _cache(figure.add_subplot(grid[1, 2:4]), ladder)
    _roof(figure.add_subplot(grid[1, 4:]), ladder)
    told = headline(ladder)
    figure.suptitle("\n".join(told), fontsize=10.5, color=SOFT, x=0.012, ha="left")
    drawn, content = BytesIO(), BytesIO()
    figure.savefig(drawn, format="png", dpi=92)
    Image.open(drawn).convert("RGB").quantize(NUM_COLOURS).save(content, format="png", optimize=True)
    write_file(path, content.getvalue())


def _rows(axis: Any, ladder: Ladder, title: str) -> None:
    """One row a rung, the first on top, named on the left."""
    axis.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=10)
    axis.set_yticks(range(len(ladder.ran)), [f"{r.title}   {r.name}" for r in ladder.ran], color=INK)
    axis.invert_yaxis()
    axis.tick_params(which="both", length=0, colors=SOFT)
    axis.tick_params(axis="y", colors=INK)
    axis.spines[:].set_visible(False)
    axis.set_axisbelow(True)


def _rate(axis: Any, ladder: Ladder) -> None:
    _rows(axis, ladder, "Output tokens a second")
    ups = {step.above.name: step for step in steps(ladder)}
    promised = [step.below.tokens_per_s * step.predicted for step in ups.values()]
    rates = [r.tokens_per_s for r in ladder.ran]
    low, high = min(rates + promised) / 1.4, max(rates + promised)
    axis.set_xscale("log")
    axis.set_xlim(low, high * 4.5)
    axis.grid(axis="x", color=RULE)
    for i, rung in enumerate(ladder.ran):
        axis.barh(i, rung.tokens_per_s - low, left=low, height=0.62, color=COLOURS[colour_of(rung)])
        end = rung.tokens_per_s
        if rung.name in ups:
            step = ups[rung.name]
            place = step.below.tokens_per_s * step.predicted
            axis.plot(place, i, "o", mfc="white", mec=INK, ms=7, mew=1.6)
            end = max(end, place * 1.05) if end / 1.05 < place < end * 2 else end
            axis.text(high * 4.4, i, ratio(step.measured), ha="right", va="center", color=SOFT)
        axis.text(end * 1.07, i, f"{rung.tokens_per_s:,.1f}", va="center", fontweight="bold")
    axis.text(high * 4.4, -0.75, "step up", ha="right", va="center", color=SOFT, fontsize=9)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    ring = Line2D([], [], marker="o", mfc="white", mec=INK, ls="", ms=7, mew=1.6, label="by the roofline, from the rung below")
    names = (("plain", "small programs"), ("engine", "the engine"))
    _key(axis, [*(Patch(color=COLOURS[kind], label=words) for kind, words in names), ring])


def _waits(axis: Any, ladder: Ladder) -> None:
    _rows(axis, ladder, "How long users wait: median to 99th percentile")
    axis.set_xscale("log")
    axis.grid(axis="x", color=RULE)
    for i, rung in enumerate(ladder.ran):
        for times, colour, y in ((rung.ttft_s, FIRST, i - 0.17), (rung.itl_s, NEXT, i + 0.17)):
            if times.p50:
                axis.plot([times.p50, times.p99], [y, y], color=colour, alpha=0.4, lw=5, solid_capstyle="round")
                axis.plot(times.p50, y, "o", color=colour, ms=7)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: duration(value)))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_yticklabels([r.name for r in ladder.ran], color=INK)
    _key(axis, [Patch(color=FIRST, label="first token"), Patch(color=NEXT, label="each next token")])


def _shares(axis: Any, ladder: Ladder) -> None:
    _rows(axis, ladder, "Computed for each token")
    for i, rung in enumerate(ladder.ran):
        each, at = rung.each(rung.cost.tokens), 0.0
        for kind, count in shares_of(rung):
            axis.barh(i, count / each, left=at, height=0.62, color=COLOURS[kind])
            at += count / each
        axis.text(1.03, i, f"{each:,.1f}", va="center", fontweight="bold")
    axis.set_xlim(0, 1.3)
    axis.set_xticks([])
    names = (("needed", "needed"), ("again", "again"), ("padding", "padding"))
    _key(axis, [Patch(color=COLOURS[kind], label=words) for kind, words in names])


def _cache(axis: Any, ladder: Ladder) -> None:
    _rows(axis, ladder, "Cache moved for each token")
    most = max(r.each(r.cost.kv_bytes) for r in ladder.ran) or 1.0
    for i, rung in enumerate(ladder.ran):
        padding = rung.each(rung.cost.kv_padding_bytes)
        moved = rung.each(rung.cost.kv_bytes)
        axis.barh(i, moved - padding, height=0.62, color=COLOURS["needed"])
        axis.barh(i, padding, left=moved - padding, height=0.62, color=COLOURS["padding"])
        words, weight, colour = (size(moved), "bold", INK) if moved else ("nothing is kept", "normal", SOFT)
        axis.text(moved + most * 0.03, i, words, va="center", fontweight=weight, color=colour)
    axis.set_xlim(0, most * 1.35)
    axis.set_xticks([])
    axis.set_yticklabels([r.name for r in ladder.ran], color=INK)
    _key(axis, [Patch(color=COLOURS["needed"], label="of tokens"), Patch(color=COLOURS["padding"], label="of padding")])


def _roof(axis: Any, ladder: Ladder) -> None:
    m = ladder.machine
    axis.set_title("Under the roof", loc="left", fontsize=12, fontweight="bold", pad=10)
    axis.set_xscale("log")
    axis.set_yscale("log")
    xs = [r.intensity for r in ladder.ran]
    low, high = min([*xs, m.ridge]) / 2, max([*xs, m.ridge]) * 3
    bottom = min(r.flops_per_s for r in ladder.ran) / 2
    axis.plot([low, m.ridge, high], [low * m.bytes_per_s, m.flops_per_s, m.flops_per_s], color=SOFT, lw=2)
    axis.text(high, m.flops_per_s * 1.12, f"{m.flops_per_s / 1e9:,.0f} GFLOP/s", ha="right", color=SOFT)
    top = m.flops_per_s * 2
    for r in ladder.ran:
        axis.plot(r.intensity, r.flops_per_s, "o", color=COLOURS[colour_of(r)], ms=8)
    for x, y, words, on_the_left in _labels(ladder, log10(high / low), log10(top / bottom)):
        shift, side = (1 / 1.14, "right") if on_the_left else (1.14, "left")
        axis.text(x * shift, y, words, va="center", ha=side, fontweight="bold")
    axis.set_xlim(low, high)
    axis.set_ylim(bottom, top)
    axis.set_xlabel("operations for each byte moved", color=SOFT)
    axis.set_ylabel("GFLOP/s", color=SOFT)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e9:g}"))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for which in (axis.xaxis, axis.yaxis):
        which.set_minor_formatter(NullFormatter())
    axis.tick_params(which="both", length=0, colors=SOFT)
    axis.grid(color=RULE)
    axis.spines[:].set_visible(False)


def _labels(ladder: Ladder, width: float, height: float) -> list[tuple[float, float, str, bool]]:
    """The points' names, those of points that lie on one another as one: place, words, and whether they stand on the left, out
    of the way of others on the right. ``width`` and ``height`` of the drawing are in powers of ten."""

    def apart(x: float, y: float, other: RungResult) -> tuple[float, float]:
        return log10(other.intensity / x) / width, abs(log10(other.flops_per_s / y)) / height

    groups: list[tuple[float, float, list[str]]] = []
    for r in ladder.ran:
        for x, y, names in groups:
            right, up = apart(x, y, r)
            if abs(right) < 0.03 and up < 0.04:
                names.append(r.name)
                break
        else:
            groups.append((r.intensity, r.flops_per_s, [r.name]))
    found = []
    for x, y, names in groups:
        others = [apart(x, y, r) for r in ladder.ran if r.name not in names]
        found.append((x, y, ", ".join(names), any(0 < right < 0.15 and up < 0.03 for right, up in others)))
    return found


def _key(axis: Any, handles: list[Any]) -> None:
    """The colours' names, under the drawing."""
    axis.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0, -0.06), ncols=3, frameon=False, fontsize=9, handlelength=1,
        columnspacing=1.2, handletextpad=0.5, borderaxespad=0,
    )  # fmt: skip
