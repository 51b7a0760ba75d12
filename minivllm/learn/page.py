"""The ladder as one HTML page: four drawings, the steps in words, the tables. Nothing is loaded from elsewhere."""

from collections.abc import Sequence
from html import escape

from minivllm.learn.report import COST, GAVE, cost_rows, gave_rows, headline, remarks
from minivllm.learn.result import Ladder, RungResult
from minivllm.learn.rungs import PLAIN
from minivllm.learn.steps import duration, ratio, size, steps
from minivllm.learn.svg import LogAxis, bar, dot, drawing, line, text

WIDTH, ROW, LEFT, RIGHT = 860, 34, 216, 770  # pixels: of a drawing, of a rung in it, of its marks
STYLE = """
:root { color-scheme: light dark; --page:#f6f7f9; --card:#fff; --ink:#17202b; --soft:#5b6776; --rule:#dde2e9;
  --plain:#7d8ba0; --engine:#0072b2; --again:#d55e00; --padding:#e69f00; --needed:#0072b2; --first:#0072b2; --next:#d55e00;
  }
@media (prefers-color-scheme: dark) { :root { --page:#10151c; --card:#182029; --ink:#e7edf4; --soft:#9aa8b8; --rule:#2b3643;
  --plain:#8c9bb0; --engine:#56b4e9; --again:#ff8c42; --padding:#f2c14e; --needed:#56b4e9; --first:#56b4e9; --next:#ff8c42;
  } }
* { box-sizing:border-box }
body { margin:0; background:var(--page); color:var(--ink); font:16px/1.55 system-ui,sans-serif }
main { max-width:1040px; margin:0 auto; padding:40px 20px 64px }
h1 { font-size:2.1rem; margin:0 0 8px; letter-spacing:-.02em } h2 { font-size:1.15rem; margin:0 0 2px } p { margin:0 0 6px }
.soft { color:var(--soft) } .lead { margin-bottom:28px; max-width:76ch }
section { background:var(--card); border:1px solid var(--rule); border-radius:14px; padding:22px 24px; margin:18px 0 }
section>p.soft { font-size:.92rem; margin-bottom:12px; max-width:84ch } .wide { overflow-x:auto }
svg { display:block; width:100%; min-width:580px; height:auto; font-size:13px } svg text { fill:var(--ink) }
svg .soft { fill:var(--soft) } svg .small { font-size:11.5px; fill:var(--soft) } svg .strong { font-weight:600 }
.grid { stroke:var(--rule) } .span { stroke:var(--first); stroke-width:5; stroke-linecap:round; opacity:.35 }
.span2 { stroke:var(--next); stroke-width:5; stroke-linecap:round; opacity:.35 }
.roof { stroke:var(--soft); stroke-width:2 } .key { display:inline-flex; align-items:center; gap:6px; margin-right:18px }
.key i { width:12px; height:12px; border-radius:3px } ol { list-style:none; margin:0; padding:0 }
li { display:grid; grid-template-columns:108px 1fr; gap:16px; padding:16px 0; border-top:1px solid var(--rule) }
li:first-child { border-top:0 } .gain { font-size:1.5rem; font-weight:650; line-height:1.1 }
.gain small { display:block; font-size:.8rem; font-weight:400; color:var(--soft); margin-top:4px }
li h3 { margin:0; font-size:1rem }
table { border-collapse:collapse; font-size:.86rem; font-variant-numeric:tabular-nums; width:100% }
th,td { padding:6px 10px; text-align:right; white-space:nowrap; border-bottom:1px solid var(--rule) }
th { color:var(--soft); font-weight:500 } th:nth-child(-n+2),td:nth-child(-n+2) { text-align:left }
@media (max-width:560px) { li { grid-template-columns:1fr } }
"""


def page(ladder: Ladder) -> str:
    """The whole page."""
    told = headline(ladder)
    notes = "".join(f'<p class="soft">{escape(note)}</p>' for note in remarks(ladder))
    parts = [
        _section("Output tokens a second", _RATE, _rate(ladder), _keys(("plain", "small programs"), ("engine", "the engine"))),
        _section("What was computed", _SHARES, _shares(ladder), _keys(*_KINDS)),
        _section("Cache moved", _CACHE, _cache(ladder), _keys(("needed", "of tokens"), ("padding", "of padding"))),
        _section("How long users wait", _WAITS, _waits(ladder), _keys(("first", "first token"), ("next", "each next token"))),
        _section("Under the roof", _ROOF, _roof(ladder), _keys(("plain", "small programs"), ("engine", "the engine"))),
        f"<section><h2>Why each step is one</h2><ol>{_steps(ladder)}</ol></section>",
        f'<section><h2>All figures</h2><div class="wide">{_table(GAVE, gave_rows(ladder))}</div><br>'
        f'<div class="wide">{_table(COST, cost_rows(ladder))}</div><br>{notes}</section>',
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>The ladder</title>'
        f"<style>{STYLE}</style></head>\n<body><main><h1>The ladder</h1>"
        f'<div class="lead"><p>The same requests, served with one more idea on each rung.</p>'
        f'{"".join(f"<p class=soft>{escape(line_)}</p>" for line_ in told)}</div>\n{"".join(parts)}\n</main></body></html>\n'
    )


_KINDS = (("needed", "needed"), ("again", "computed again"), ("padding", "padding"))
_RATE = "The ring is where the roofline puts a rung, counted from the one below it. The axis is logarithmic."
_SHARES = "Tokens that passed the model, for each token that came out, and what they were."
_CACHE = "Bytes of K and V that were read, written and copied, for each token that came out."
_WAITS = (
    "From the median (dot) to the 99th percentile. The axis is logarithmic. With all requests there at once, a first token "
    "waits in the queue."
)
_ROOF = (
    "Operations for each byte moved, and operations a second. Under the slope a program waits for memory, under the level part "
    "for arithmetic; the distance to the roof is everything else."
)


def _section(title: str, words: str, picture: str, keys: str) -> str:
    told = f'<p class="soft">{words}</p><p class="soft">{keys}</p>'
    return f'<section><h2>{title}</h2>{told}<div class="wide">{picture}</div></section>\n'


def _keys(*keys: tuple[str, str]) -> str:
    return "".join(f'<span class="key"><i style="background:var(--{colour})"></i>{words}</span>' for colour, words in keys)


def colour_of(rung: RungResult) -> str:
    """The small programs and the engine are told apart."""
    return "plain" if rung.name in PLAIN else "engine"


def _frame(ladder: Ladder, axis: LogAxis, shown: Sequence[str]) -> list[str]:
    """The rungs' names on the left, and the axis above them."""
    bottom = 30 + ROW * len(ladder.ran)
    marks = []
    for value, words in zip(axis.ticks(), shown, strict=True):
        marks += [line(axis.at(value), 24, axis.at(value), bottom, "grid"), text(axis.at(value), 16, words, "small", "middle")]
    for i, rung in enumerate(ladder.ran):
        y = 30 + ROW * i + 21
        marks += [text(22, y, rung.name, "strong", "end"), text(34, y, rung.title)]
    return marks


def _rate(ladder: Ladder) -> str:
    """Bars of tokens a second, with what the roofline said."""
    ups = {step.above.name: step for step in steps(ladder)}
    promised = {name: step.below.tokens_per_s * step.predicted for name, step in ups.items()}
    axis = LogAxis.over([*(r.tokens_per_s for r in ladder.ran), *promised.values()], LEFT, RIGHT - 60, room=1.3)
    marks = _frame(ladder, axis, [f"{value:g}" for value in axis.ticks()])
    marks.append(text(RIGHT + 80, 16, "step up", "small", "end"))
    for i, rung in enumerate(ladder.ran):
        y, end = 30 + ROW * i, axis.at(rung.tokens_per_s)
        marks.append(bar(LEFT, y + 6, end - LEFT, ROW - 12, colour_of(rung), f"{rung.tokens_per_s:,.1f} tokens/s"))
        if rung.name in promised:
            x = axis.at(promised[rung.name])
            marks.append(dot(x, y + ROW / 2, 5, "ink", f"predicted: {promised[rung.name]:,.1f} tokens/s", hollow=True))
            end = max(end, x + 5) if x - end < 90 else end
        up = f"  {ratio(ups[rung.name].measured)}" if rung.name in ups else ""
        marks.append(text(end + 8, y + 21, f"{rung.tokens_per_s:,.1f}", "strong"))
        marks.append(text(RIGHT + 80, y + 21, up, "soft", "end"))
    return drawing(WIDTH, 36 + ROW * len(ladder.ran), marks, "Output tokens a second of each rung")


def shares_of(rung: RungResult) -> tuple[tuple[str, float], ...]:
    """Tokens computed for each output token: needed, again, padding."""
    counts = (rung.cost.tokens - rung.recomputed - rung.cost.padding, rung.recomputed, rung.cost.padding)
    return tuple((kind, rung.each(count)) for (kind, _), count in zip(_KINDS, counts, strict=True))


def _shares(ladder: Ladder) -> str:
    """Bars of what was computed, all of one length: the number beside each says how much it was."""
    marks = []
    for i, rung in enumerate(ladder.ran):
        y, x = ROW * i, float(LEFT)
        each = rung.each(rung.cost.tokens)
        marks += [text(22, y + 21, rung.name, "strong", "end"), text(34, y + 21, rung.title)]
        for kind, count in shares_of(rung):
            width = (RIGHT - 60 - LEFT) * count / each
            if count:
                marks.append(bar(x, y + 6, width - 1, ROW - 12, kind, f"{kind}: {count:,.1f} tokens, {count / each:.0%}"))
            x += width
        marks.append(text(RIGHT - 48, y + 21, f"{each:,.1f} tokens", "strong"))
    return drawing(WIDTH, 6 + ROW * len(ladder.ran), marks, "Tokens computed for each output token")


def _cache(ladder: Ladder) -> str:
    """Bars of cache moved for each output token, padding at their end."""
    most = max(rung.each(rung.cost.kv_bytes) for rung in ladder.ran) or 1.0
    marks = []
    for i, rung in enumerate(ladder.ran):
        y, x = ROW * i, float(LEFT)
        marks += [text(22, y + 21, rung.name, "strong", "end"), text(34, y + 21, rung.title)]
        padding = rung.cost.kv_padding_bytes
        for kind, moved in (("needed", rung.cost.kv_bytes - padding), ("padding", padding)):
            width = (RIGHT - 60 - LEFT) * rung.each(moved) / most
            if moved:
                marks.append(bar(x, y + 6, width - 1, ROW - 12, kind, f"{kind}: {size(rung.each(moved))}"))
            x += width
        words = size(rung.each(rung.cost.kv_bytes)) if rung.cost.kv_bytes else "nothing is kept"
        marks.append(text(x + 8, y + 21, words, "strong" if rung.cost.kv_bytes else "soft"))
    return drawing(WIDTH, 6 + ROW * len(ladder.ran), marks, "Bytes of cache moved for each output token")


def _waits(ladder: Ladder) -> str:
    """Lines from p50 to p99 of TTFT and ITL."""
    every = [s for r in ladder.ran for p in (r.ttft_s, r.itl_s) for s in (p.p50, p.p99)]
    axis = LogAxis.over(every, LEFT, RIGHT + 40)
    marks = _frame(ladder, axis, [duration(value) for value in axis.ticks()])
    for i, rung in enumerate(ladder.ran):
        for kind, colour, times, y in (
            ("span", "first", rung.ttft_s, 30 + ROW * i + 11),
            ("span2", "next", rung.itl_s, 30 + ROW * i + 23),
        ):
            if times.p50:
                told = f"p50 {duration(times.p50)}, p99 {duration(times.p99)}"
                marks.append(line(axis.at(times.p50), y, axis.at(times.p99), y, kind))
                marks.append(dot(axis.at(times.p50), y, 4.5, colour, told))
    return drawing(WIDTH, 36 + ROW * len(ladder.ran), marks, "Waiting times of each rung")


def _roof(ladder: Ladder) -> str:
    """The machine's roofline, and every rung under it."""
    m, height = ladder.machine, 380
    xs = LogAxis.over([*(r.intensity for r in ladder.ran), m.ridge, m.ridge * 4], 70, WIDTH - 30, room=1.6)
    ys = LogAxis.over([*(r.flops_per_s for r in ladder.ran), m.flops_per_s], height - 40, 20, room=1.8)
    marks = []
    for value in xs.ticks():
        marks.append(line(xs.at(value), 20, xs.at(value), height - 40, "grid"))
        marks.append(text(xs.at(value), height - 22, f"{value:g}", "small", "middle"))
    for value in ys.ticks():
        marks.append(line(70, ys.at(value), WIDTH - 30, ys.at(value), "grid"))
        marks.append(text(62, ys.at(value) + 4, f"{value / 1e9:g}", "small", "end"))
    start = max(xs.low, ys.low / m.bytes_per_s)
    marks.append(line(xs.at(start), ys.at(start * m.bytes_per_s), xs.at(m.ridge), ys.at(m.flops_per_s), "roof"))
    marks.append(line(xs.at(m.ridge), ys.at(m.flops_per_s), WIDTH - 30, ys.at(m.flops_per_s), "roof"))
    marks.append(text(WIDTH - 34, ys.at(m.flops_per_s) - 8, f"{m.flops_per_s / 1e9:,.0f} GFLOP/s", "soft", "end"))
    marks.append(text(WIDTH - 30, height - 6, "operations for each byte moved", "small", "end"))
    marks.append(text(70, 12, "GFLOP/s", "small"))
    groups: list[tuple[float, float, list[str]]] = []  # rungs that lie on top of each other share a label
    for rung in ladder.ran:
        x, y = xs.at(rung.intensity), ys.at(rung.flops_per_s)
        told = f"{rung.name} {rung.title}: {rung.intensity:.1f} op/byte, {rung.flops_per_s / 1e9:,.1f} GFLOP/s"
        marks.append(dot(x, y, 6, colour_of(rung), told))
        near = next((names for gx, gy, names in groups if abs(gx - x) < 24 and abs(gy - y) < 13), None)
        if near is None:
            groups.append((x, y, [rung.name]))
        else:
            near.append(rung.name)
    for x, y, names in groups:
        shift, anchor = (13, "start") if len(names) == 1 else (-13, "end")
        marks.append(text(x + shift, y + 5, ", ".join(names), "strong", anchor))
    return drawing(WIDTH, height, marks, "The rungs under this machine's roofline")


def _steps(ladder: Ladder) -> str:
    """A card a step."""
    found = []
    for step in steps(ladder):
        words = " ".join(step.sentences)
        found.append(
            f'<li><div class="gain">{ratio(step.measured)}<small>{ratio(step.predicted)} predicted</small></div><div>'
            f"<h3>{step.below.name} → {step.above.name}: {escape(step.above.title)}</h3><p>{escape(step.above.idea)}</p>"
            f'<p class="soft">{escape(words)}</p></div></li>'
        )
    return "".join(found)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr></thead><tbody>{cells}</tbody></table>"
