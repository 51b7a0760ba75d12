"""A small canvas: rectangles, lines and words as SVG, the same bytes for the same calls.

A picture is a card with a background of its own, in a light and a dark set of colours that the viewer's system chooses; the
page around it may have either. Colours tell requests apart, and never alone: each request has its letter, and each kind of
cell a shape or a pattern of its own. The hues are those of Okabe and Ito (2008), which stay apart for colour-blind readers.

It knows nothing of requests or steps; ``draw_steps.py`` and ``draw_blocks.py`` do.
"""

from typing import Final, Literal
from xml.sax.saxutils import escape

HUES: Final = 6  # requests beyond it begin with the first again
Anchor = Literal["start", "middle", "end"]

# (light, dark) of each hue, and what is legible on it.
_HUES: Final = (
    ("#0072b2", "#3d9fdc", "#ffffff", "#08131c"),  # blue
    ("#e69f00", "#e9ab24", "#201500", "#201500"),  # orange
    ("#009e73", "#1fb98f", "#ffffff", "#04150f"),  # green
    ("#cc79a7", "#d98fb9", "#22101a", "#22101a"),  # purple
    ("#56b4e9", "#7cc7f2", "#06202f", "#06202f"),  # sky
    ("#c44e00", "#ec7d35", "#ffffff", "#1d0c00"),  # vermilion
)
_STYLE: Final = """
text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:var(--ink)}
.head{font-size:13px;font-weight:600}.dim{fill:var(--dim)}.small{font-size:10.5px}.on{font-size:10px;font-weight:600}
.mono{font-family:ui-monospace,"SF Mono",Menlo,Consolas,monospace;font-size:11px}
.card{fill:var(--card);stroke:var(--edge)}.plate{fill:var(--card)}.line{stroke:var(--edge);stroke-width:1;fill:none}
.strong{stroke:var(--ink);stroke-width:1.2;fill:none}.idle{fill:none;stroke:var(--dim);stroke-dasharray:2 2;stroke-width:.8}
.free{fill:var(--free)}.bar{fill:var(--bar)}.bar2{fill:var(--dim);fill-opacity:.55}.lost{stroke:var(--bad);stroke-width:2;fill:none}
.bad{fill:var(--bad)}.pad{fill:url(#pad);stroke:var(--dim);stroke-width:.5}
""".strip()


def _themes() -> str:
    base = (
        ("ink", "#1c2126", "#e4e8ec"),
        ("dim", "#6b747d", "#98a2ac"),
        ("card", "#ffffff", "#171c21"),
        ("edge", "#d5dbe0", "#38414a"),
        ("free", "#eef1f3", "#232a31"),
        ("bar", "#46525d", "#aeb8c2"),
        ("bad", "#b3261e", "#ff8a80"),
    )
    light = "".join(f"--{name}:{value};" for name, value, _ in base)
    dark = "".join(f"--{name}:{value};" for name, _, value in base)
    light += "".join(f"--h{i}:{hue[0]};--o{i}:{hue[2]};" for i, hue in enumerate(_HUES))
    dark += "".join(f"--h{i}:{hue[1]};--o{i}:{hue[3]};" for i, hue in enumerate(_HUES))
    hues = "".join(
        f".f{i}{{fill:var(--h{i})}}.t{i}{{fill:var(--h{i});fill-opacity:.33;stroke:var(--h{i});stroke-width:.8}}"
        f".c{i}{{fill:url(#hatch{i});stroke:var(--h{i});stroke-width:.8}}.o{i}{{fill:var(--o{i})}}"
        f".w{i}{{stroke:var(--h{i});stroke-width:1.6;stroke-dasharray:1.5 3.5;fill:none}}"
        for i in range(HUES)
    )
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{hues}"


def _patterns() -> str:
    hatches = "".join(
        f'<pattern id="hatch{i}" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        f'<path d="M0 0V5" style="stroke:var(--h{i});stroke-width:3"/></pattern>'
        for i in range(HUES)
    )
    pad = (
        '<pattern id="pad" width="6" height="6" patternUnits="userSpaceOnUse"><path d="M0 0L6 6M6 0L0 6" '
        'style="stroke:var(--dim);stroke-width:.7"/></pattern>'
    )
    return hatches + pad


class Canvas:
    """A picture in the making. Written by the function that draws it.

    Kinds of shapes are classes of the style: ``f0`` a full cell of hue 0, ``t0`` a tinted one, ``c0`` a hatched one, ``w0`` a
    dotted line; ``idle``, ``free``, ``pad``, ``bar``, ``line``, ``lost`` have no hue.
    """

    def __init__(self, width: float, title: str, description: str) -> None:
        self.width = width
        self._title, self._description = title, description
        self._shapes: list[str] = []

    def rect(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        """A cell."""
        size = f'x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}"'
        self._shapes.append(f'<rect {size} rx="{1.5 if min(width, height) > 5 else 0}" class="{kind}"/>')

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str = "line") -> None:
        """A straight line."""
        self._shapes.append(f'<path d="M{_n(x1)} {_n(y1)}L{_n(x2)} {_n(y2)}" class="{kind}"/>')

    def cross(self, x: float, y: float, size: float = 4) -> None:
        """Something was taken away here."""
        self.line(x - size, y - size, x + size, y + size, "lost")
        self.line(x - size, y + size, x + size, y - size, "lost")

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: Anchor = "start") -> None:
        """Words whose baseline is at ``y``."""
        where = "" if anchor == "start" else f' text-anchor="{anchor}"'
        named = f' class="{kind}"' if kind else ""
        self._shapes.append(f'<text x="{_n(x)}" y="{_n(y)}"{where}{named}>{escape(words)}</text>')

    def svg(self, height: float) -> str:
        """The whole picture, on a card of this height."""
        size = f'viewBox="0 0 {_n(self.width)} {_n(height)}" width="{_n(self.width)}" height="{_n(height)}"'
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="t d">',
            f'<title id="t">{escape(self._title)}</title><desc id="d">{escape(self._description)}</desc>',
            f"<style>{_themes()}\n{_STYLE}</style><defs>{_patterns()}</defs>",
            f'<rect x=".5" y=".5" width="{_n(self.width - 1)}" height="{_n(height - 1)}" rx="8" class="card"/>',
            *self._shapes,
            "</svg>\n",
        ])


def text_width(words: str, size: float = 12) -> float:
    """How wide words of that size are, about: no font is asked."""
    return 0.56 * size * len(words)


def _n(value: float) -> str:
    """A number in as few characters as a tenth of a pixel needs."""
    return f"{value:.1f}".removesuffix(".0")
