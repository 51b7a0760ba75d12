"""Pictures with a scale: how blocks are used, when steps began and ended, how often tokens were drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from minivllm.learn.canvas import Anchor, Canvas, text_width
from minivllm.learn.draw_steps import PAD, WIDTH, Panel, num_steps
from minivllm.records import StepRecord

BAR: Final = 15  # height of a bar that stands for a time or a number


@dataclass(frozen=True)
class Draws:
    """How often each token came, of so many draws; and how likely the model says it is, where that is to be marked."""

    title: str
    counts: Mapping[str, int]
    chances: Mapping[str, float]


def _key(canvas: Canvas, y: float, entries: Sequence[tuple[str, str]]) -> None:
    x = float(PAD)
    for kind, words in entries:
        canvas.rect(x, y - 11, 18, 14, kind)
        canvas.text(x + 24, y, words, "dim")
        x += 24 + text_width(words) + 18


def held_cached_free(records: Sequence[StepRecord], title: str) -> str:
    """How many blocks are held, cached and free after each step."""
    shown = [record for record in records if record.rows]
    canvas = Canvas(WIDTH, title, "blocks held, cached and free, step by step")
    canvas.text(PAD, PAD + 10, title, "head")
    left, top, height = PAD + 62.0, PAD + 28.0, 120.0
    cell = min(30.0, (WIDTH - PAD - left) / num_steps(records))
    scale = height / shown[0].blocks_total
    for step, record in enumerate(shown):
        x, width = left + step * cell + 0.6, cell - 1.2
        y = top + height
        for count, kind in ((record.blocks_referenced, "bar"), (record.blocks_cached, "pad"), (record.blocks_free, "free")):
            y -= count * scale
            if count:
                canvas.rect(x, y, width, count * scale, kind)
    canvas.text(left - 8, top + 9, f"{shown[0].blocks_total} blocks", "dim small", "end")
    canvas.text(left - 8, top + height, "0", "dim small", "end")
    every = next(n for n in (1, 2, 5, 10, 20, 50) if n * cell >= 26)
    for step in range(0, len(shown), every):
        canvas.text(left + (step + 0.5) * cell, top + height + 14, str(step), "dim small", "middle")
    y = top + height + 40
    _key(canvas, y, (("bar", "held"), ("pad", "cached"), ("free", "free")))
    return canvas.svg(y + PAD)


def clock(panels: Sequence[Panel], title: str, span_ms: float) -> str:
    """Steps on the clock: what the host did until a step was launched (dark), and from then until its tokens were read (light).
    Steps that overlap take turns on two lines."""
    canvas = Canvas(WIDTH, title, "; ".join(panel.title for panel in panels))
    canvas.text(PAD, PAD + 10, title, "head")
    left, y = PAD + 4.0, PAD + 28.0
    scale = (WIDTH - PAD - left) / span_ms
    for panel in panels:
        canvas.text(PAD, y + 10, panel.title)
        y += 17
        shown = [record for record in panel.records if record.rows]
        begin_s = shown[0].scheduled_s
        overlaps = any(b.scheduled_s < a.finished_s for a, b in pairwise(shown))
        for i, record in enumerate(shown):
            times = (record.scheduled_s, record.launched_s, record.finished_s)
            planned, launched, read = (min(1e3 * (t - begin_s), span_ms) for t in times)
            line = y + (BAR + 3) * (i % 2 if overlaps else 0)
            if launched > planned:
                canvas.rect(left + planned * scale, line, (launched - planned) * scale, BAR, "bar")
            if read > launched:
                x, width = left + launched * scale, (read - launched) * scale
                canvas.rect(x, line, width, BAR, f"t{i % 2}")
                if width > text_width(str(i), 10) + 6:
                    canvas.text(x + 4, line + 11, str(i), "on")
        y += (BAR + 3) * (2 if overlaps else 1) + 14
    every = next(n for n in (0.2, 0.5, 1, 2, 5, 10, 20) if n * scale >= 60)
    canvas.line(left, y - 4, WIDTH - PAD, y - 4)
    for k in range(int(span_ms / every) + 1):
        canvas.line(left + k * every * scale, y - 8, left + k * every * scale, y - 4)
        anchor: Anchor = "start" if k == 0 else "middle" if k * every < 0.97 * span_ms else "end"
        canvas.text(left + k * every * scale, y + 9, f"{k * every:g} ms", "dim small", anchor)
    y += 32
    _key(canvas, y, (("bar", "the host plans the step and packs its page"), ("t0", "launched, until its tokens are read")))
    return canvas.svg(y + PAD)


def draws(panels: Sequence[Draws], title: str, tokens: Sequence[str], rest: str) -> str:
    """How often tokens were drawn under several settings, side by side. ``tokens``: the lines; ``rest``: what all others are
    called."""
    canvas = Canvas(WIDTH, title, "; ".join(panel.title for panel in panels))
    canvas.text(PAD, PAD + 10, title, "head")
    left = PAD + max(map(text_width, (*tokens, rest))) + 10
    each = (WIDTH - PAD - left) / len(panels)
    bars = [[*(panel.counts.get(token, 0) for token in tokens), _others(panel, tokens)] for panel in panels]
    highest = max(max(counts) / sum(counts) for counts in bars)
    top = PAD + 52.0
    for i, token in enumerate((*tokens, rest)):
        canvas.text(left - 8, top + i * (BAR + 4) + 12, token, "mono" if token != rest else "dim", "end")
    for k, panel in enumerate(panels):
        x, total = left + k * each, sum(bars[k])
        canvas.text(x, PAD + 34, panel.title)
        scale = (each - 62) / highest
        for i, token in enumerate((*tokens, rest)):
            count, y = bars[k][i], top + i * (BAR + 4)
            canvas.rect(x, y, max(0.6, count / total * scale), BAR, "bar2" if token == rest else f"f{k}")
            if token in panel.chances:
                at = x + panel.chances[token] * scale
                canvas.line(at, y - 2, at, y + BAR + 2, "strong")
            canvas.text(x + max(count / total, panel.chances.get(token, 0)) * scale + 5, y + 12, str(count), "dim small")
    y = top + (len(tokens) + 1) * (BAR + 4) + 20
    canvas.line(PAD + 4, y - 11, PAD + 4, y + 3, "strong")
    canvas.text(PAD + 12, y, "what the model says, before anything is changed", "dim")
    return canvas.svg(y + PAD)


def _others(panel: Draws, tokens: Sequence[str]) -> int:
    return sum(count for name, count in panel.counts.items() if name not in tokens)
