"""A few marks of SVG, and the logarithmic axis that all pictures of the ladder need: its figures span three orders of size.

Colours are names of CSS variables, so that the page around a drawing decides what they are, in light and in dark.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class LogAxis:
    """Values from ``low`` to ``high`` on the pixels from ``start`` to ``stop``."""

    low: float
    high: float
    start: float
    stop: float

    @staticmethod
    def over(values: Iterable[float], start: float, stop: float, room: float = 1.15) -> "LogAxis":
        """An axis that holds all of ``values``, with some room at both ends."""
        found = [v for v in values if v > 0]
        return LogAxis(min(found) / room, max(found) * room, start, stop)

    def at(self, value: float) -> float:
        """Where a value lies."""
        share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Round values on the axis: powers of ten; more where it is short."""
        decades = math.log10(self.high / self.low)
        steps = (1,) if decades > 2.5 else (1, 3) if decades > 1.2 else (1, 2, 5)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        return [s * 10.0**p for p in powers for s in steps if self.low <= s * 10.0**p <= self.high]


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """A line of words; ``kind`` is its CSS class."""
    name = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{name}>{escape(words)}</text>'


def bar(x: float, y: float, width: float, height: float, colour: str, told: str = "") -> str:
    """A box with round corners; ``told`` shows when the pointer rests on it."""
    title = f"<title>{escape(told)}</title>" if told else ""
    shape = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 1):.1f}" height="{height:.1f}" rx="3"'
    return f'<rect {shape} style="fill:var(--{colour})">{title}</rect>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A line of a CSS class."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def dot(x: float, y: float, radius: float, colour: str, told: str = "", *, hollow: bool = False) -> str:
    """A point, filled or as a ring."""
    title = f"<title>{escape(told)}</title>" if told else ""
    style = f"fill:var(--card);stroke:var(--{colour});stroke-width:2" if hollow else f"fill:var(--{colour})"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" style="{style}">{title}</circle>'


def drawing(width: int, height: float, marks: Iterable[str], label: str) -> str:
    """The marks as one picture; ``label`` is what a screen reader says of it."""
    inside = "\n".join(marks)
    return f'<svg viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{escape(label)}">\n{inside}\n</svg>'
