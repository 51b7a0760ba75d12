"""The picture of a run: output tokens/s, TTFT and ITL over the number of concurrent requests."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cpu.table import Record, counted, labels, sizes, values

PANELS = (
    ("tokens_per_s", "output tokens/s"),
    ("ttft_p50_ms", "time to first token, median, ms"),
    ("itl_p50_ms", "time between tokens, median, ms"),
)


def draw(records: Sequence[Record], path: Path) -> None:
    """Write the PNG. Lines are medians of rounds, bars the lowest and highest round; a contender keeps its colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = counted(records)
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(19, 6.5), layout="constrained")
    names, columns = labels(records), sizes(records)
    colours = matplotlib.colormaps["tab20"]
    for axis, (key, title) in zip(axes, PANELS, strict=True):
        for i, label in enumerate(names):
            points = [(n, found) for n in columns if (found := values(records, label, n, key))]
            if not points:
                continue
            middles = [statistics.median(found) for _, found in points]
            below = [m - min(found) for m, (_, found) in zip(middles, points, strict=True)]
            above = [max(found) - m for m, (_, found) in zip(middles, points, strict=True)]
            axis.errorbar(
                [n for n, _ in points],
                middles,
                yerr=(below, above),
                label=label,
                color=colours(i % colours.N),
                linestyle="-" if label.startswith("mini-vLLM") else "--",
                marker="o",
                markersize=4,
                capsize=2,
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(columns, [str(n) for n in columns])
        axis.set_xlabel("concurrent requests")
        axis.set_title(title)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    first = records[0]
    figure.suptitle(
        f"{first['shape']}, {first['prompt_len']} prompt + {first['output_len']} output tokens, {first['threads']} threads, "
        f"{first['machine']['cpu']}"
    )
    handles, texts = axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
