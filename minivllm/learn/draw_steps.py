"""Pictures of steps: who was in which step with how many tokens, and what a request computed where.

Every function takes the StepRecords of one engine in their order and gives an SVG. One column is one step, whatever it took:
what a picture shows is the scheduler's work, which is the same on every machine. Times are a matter of tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from minivllm.learn.canvas import HUES, Canvas, text_width
from minivllm.records import RowRecord, StepRecord

WIDTH: Final = 860
PAD: Final = 18
LANE: Final = 26  # from one lane to the next
CELL_HEIGHT: Final = 20
WIDEST_CELL, NARROWEST_NUMBER = 34, 20  # of a column; of one in which a cell has its number inside


@dataclass
class Life:
    """What became of one request, by step. Written by ``lives``."""

    id: str
    hue: int
    arrived: int = 0  # the first step that could have had it
    num_prompt: int = 0
    note: str = ""  # what else its lane is to say
    rows: dict[int, RowRecord] = field(default_factory=dict)
    preempted: list[int] = field(default_factory=list)  # in the planning of these steps
    why: dict[int, str] = field(default_factory=dict)  # it had no row: the code of the reason
    ended: int | None = None  # the step after which it was gone

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """Steps in which it was there and did nothing: (first, the one after the last)."""
        marks = [self.arrived - 1, *sorted(self.rows)]
        return [(a + 1, b) for a, b in pairwise(marks) if b > a + 1]


@dataclass(frozen=True)
class Panel:
    """A recording and what is said of it."""

    records: Sequence[StepRecord]
    title: str


def lives(records: Sequence[StepRecord]) -> list[Life]:
    """The lives of all requests, in the order of their arrival."""
    found: dict[str, Life] = {}
    step = 0
    for record in records:
        for arrival in record.arrived:
            note = f"priority {arrival.priority}" if arrival.priority else ""
            found[arrival.id] = Life(arrival.id, len(found) % HUES, step, arrival.num_prompt, note)
        for gone in record.preempted:
            found[gone.id].preempted.append(step)
        for row in record.rows:
            found[row.id].rows[step] = row
        named = {wait.id: wait.reason for wait in record.waits}
        for life in found.values():
            if record.rows and life.ended is None and step not in life.rows:
                life.why[step] = named.get(life.id, record.rest_waits).partition(":")[0]
        for end in record.finished:
            found[end.id].ended = step
        step += bool(record.rows)
    return list(found.values())


def num_steps(records: Sequence[StepRecord]) -> int:
    """Steps in a recording, records without one left out."""
    return sum(bool(record.rows) for record in records)


def seats(all_lives: Sequence[Life]) -> list[list[Life]]:
    """Lives by the place that they would take in the batch: the lowest that is free when they begin."""
    taken: list[list[Life]] = []
    for life in sorted(all_lives, key=lambda one: min(one.rows)):
        free = next((seat for seat in taken if (seat[-1].ended or 0) < min(life.rows)), None)
        if free is None:
            taken.append([life])
        else:
            free.append(life)
    return taken


class _Lanes:
    """Lanes of one panel, drawn onto a canvas. Columns are steps."""

    def __init__(self, canvas: Canvas, left: float, top: float, columns: int, cell: float) -> None:
        self.canvas, self.left, self.top, self.columns, self.cell = canvas, left, top, columns, cell

    def x(self, step: float) -> float:
        """Where a step's column begins."""
        return self.left + step * self.cell

    def life(self, life: Life, lane: int) -> None:
        """One request: its cells, the times it waited, the places where it was preempted."""
        y, canvas = self.top + lane * LANE, self.canvas
        steps = sorted(life.rows)
        for first, last in life.gaps:
            middle = y + CELL_HEIGHT / 2
            canvas.line(self.x(first) + 3, middle, self.x(last) - 2, middle, f"w{life.hue}")
            words = ", ".join(dict.fromkeys(why for step in range(first, last) if (why := life.why.get(step))))
            wide = text_width(words, 10.5) + 10
            if words and (last - first) * self.cell > wide + 24:
                left = (self.x(first) + self.x(last) - wide) / 2
                canvas.rect(left, y + 2, wide, CELL_HEIGHT - 4, "plate")
                canvas.text(left + wide / 2, y + 13.5, words, "small dim", "middle")
        for step in steps:
            self.cell_of(life, step, y)
        for step in life.preempted:
            canvas.cross(self.x(step) + self.cell / 2, y + CELL_HEIGHT / 2)

    def cell_of(self, life: Life, step: int, y: float) -> None:
        """What one request did in one step."""
        row, x, width = life.rows[step], self.x(step) + 0.8, self.cell - 1.6
        if row.kind == "decode":
            self.canvas.rect(x, y, width, CELL_HEIGHT, f"t{life.hue}")
            return
        self.canvas.rect(x, y, width, CELL_HEIGHT, f"f{life.hue}")
        if row.cached:
            self.canvas.rect(x, y + CELL_HEIGHT - 7, width, 7, "plate")
            self.canvas.rect(x, y + CELL_HEIGHT - 7, width, 7, f"c{life.hue}")
        if width >= text_width(str(row.num_tokens), 10) + 1:
            baseline = y + (10 if row.cached else 14)
            self.canvas.text(x + width / 2, baseline, str(row.num_tokens), f"on o{life.hue}", "middle")

    def idle(self, lane: int, step: int) -> None:
        """A place in the batch that nobody used."""
        self.canvas.rect(self.x(step) + 1.3, self.top + lane * LANE + 0.5, self.cell - 2.6, CELL_HEIGHT - 1, "idle")

    def bars(self, records: Sequence[StepRecord], y: float, height: float, highest: int) -> None:
        """Tokens of each step: prompts' dark, decodes' light."""
        step = 0
        for record in records:
            if not record.rows:
                continue
            decodes = sum(row.num_tokens for row in record.rows if row.kind == "decode")
            total = sum(row.num_tokens for row in record.rows)
            x, scale = self.x(step) + 0.8, height / highest
            self.canvas.rect(x, y + height - total * scale, self.cell - 1.6, (total - decodes) * scale, "bar")
            self.canvas.rect(x, y + height - decodes * scale, self.cell - 1.6, decodes * scale, "bar2")
            step += 1
        self.canvas.line(self.left, y + height + 0.5, self.x(self.columns), y + height + 0.5)

    def axis(self, y: float) -> None:
        """Numbers of steps."""
        every = next(n for n in (1, 2, 5, 10, 20, 50, 100) if n * self.cell >= 26)
        for step in range(0, self.columns, every):
            self.canvas.text(self.x(step + 0.5), y, str(step), "dim small", "middle")
        self.canvas.text(self.left - 8, y, "step", "dim small", "end")


def _tokens(records: Sequence[StepRecord]) -> list[int]:
    return [sum(row.num_tokens for row in record.rows) for record in records if record.rows]


def _key(canvas: Canvas, y: float, panels: Sequence[Panel], idle: bool) -> None:
    """What the shapes mean, of those that are there."""
    rows = [row for panel in panels for record in panel.records for row in record.rows]
    every_life = [life for panel in panels for life in lives(panel.records)]
    x = float(PAD)
    entries = [("f0", "12", "prompt, with its tokens"), ("t0", "", "one token decoded")]
    if any(row.cached for row in rows):
        entries.append(("c0", "", "found in the cache"))
    if not idle and any(life.gaps for life in every_life):
        entries.append(("w0", "", "waits, for what"))
    if any(life.preempted for life in every_life):
        entries.append(("lost", "", "preempted"))
    if idle:
        entries.append(("idle", "", "idle place"))
    for kind, inside, words in entries:
        if kind == "w0":
            canvas.line(x, y - 4, x + 18, y - 4, kind)
        elif kind == "lost":
            canvas.cross(x + 9, y - 4)
        else:
            canvas.rect(x, y - 11, 18, 14, kind)
            if inside:
                canvas.text(x + 9, y - 0.5, inside, "on o0", "middle")
        canvas.text(x + 24, y, words, "dim")
        x += 24 + text_width(words) + 18


def lanes(panels: Sequence[Panel], title: str, *, by_seat: bool = False) -> str:
    """A time-line for each recording: a lane a request (or, ``by_seat``, a place in the batch), a column a step, and under it
    how many tokens each step computed."""
    canvas = Canvas(WIDTH, title, "; ".join(panel.title for panel in panels))
    columns = max(num_steps(panel.records) for panel in panels)
    highest = max(max(_tokens(panel.records)) for panel in panels)
    all_lives = [lives(panel.records) for panel in panels]
    left = PAD + max(text_width("(most: 999)", 10.5), *(text_width(_label(life)) for some in all_lives for life in some)) + 12
    cell = min(WIDEST_CELL, (WIDTH - PAD - left) / columns)
    y = float(PAD)
    canvas.text(PAD, y + 10, title, "head")
    y += 28
    for panel, some in zip(panels, all_lives, strict=True):
        if len(panels) > 1:
            canvas.text(PAD, y + 10, panel.title)
            y += 22
        drawn = _Lanes(canvas, left, y, columns, cell)
        rows = seats(some) if by_seat else [[life] for life in some]
        for lane, row in enumerate(rows):
            _lane(drawn, lane, row, num_steps(panel.records), by_seat=by_seat)
        y += len(rows) * LANE + 6
        drawn.bars(panel.records, y, 30, highest)
        canvas.text(left - 8, y + 10, "tokens", "dim small", "end")
        canvas.text(left - 8, y + 22, f"(most: {max(_tokens(panel.records))})", "dim small", "end")
        y += 44
        drawn.axis(y)
        y += 26 if len(panels) > 1 else 10
    _key(canvas, y + 16, panels, by_seat)
    return canvas.svg(y + 16 + PAD)


def _lane(drawn: _Lanes, lane: int, row: list[Life], steps: int, *, by_seat: bool) -> None:
    y = drawn.top + lane * LANE
    drawn.canvas.text(drawn.left - 8, y + 14, f"row {lane}" if by_seat else _label(row[0]), "", "end")
    used = {step for life in row for step in life.rows}
    if by_seat:
        for step in range(steps):
            if step not in used:
                drawn.idle(lane, step)
    for life in row:
        if by_seat:
            life.arrived = min(life.rows)  # where it waited is another lane's
        drawn.life(life, lane)
        if by_seat:
            first = min(life.rows)
            if drawn.cell * len(life.rows) > 40 and first + 1 in life.rows:
                drawn.canvas.text(drawn.x(first + 1) + 4, y + 14, life.id)


def _label(life: Life) -> str:
    return f"{life.id}  {life.note}".rstrip()


def positions(panels: Sequence[tuple[Panel, Sequence[str]]], title: str) -> str:
    """For one request: which positions each step computed (full), and which it only read (tinted). ``panels``: recordings, and
    lines that are said beside each."""
    canvas = Canvas(WIDTH, title, "; ".join(panel.title for panel, _ in panels))
    canvas.text(PAD, PAD + 10, title, "head")
    each, top = (WIDTH - 2 * PAD) / len(panels), PAD + 58.0
    longest = max(row.start + row.num_tokens for panel, _ in panels for record in panel.records for row in record.rows)
    columns = max(num_steps(panel.records) for panel, _ in panels)
    cell = min((each - 34 - 150) / columns, 270 / longest)
    for i, (panel, words) in enumerate(panels):
        left = PAD + i * each + 34
        canvas.text(left - 34, PAD + 34, panel.title)
        for step, record in enumerate(record for record in panel.records if record.rows):
            row = record.rows[0]
            for position in range(row.start + row.num_tokens):
                kind = "t0" if position < row.start else "f0"
                canvas.rect(left + step * cell + 0.8, top + position * cell + 0.8, cell - 1.6, cell - 1.6, kind)
        canvas.text(left, top - 6, "step →", "dim small")
        for mark, baseline in (("0", top + 10), (str(longest - 1), top + longest * cell - 3)):
            canvas.text(left - 6, baseline, mark, "dim small", "end")
        canvas.text(left - 6, top + longest * cell / 2, "pos.", "dim small", "end")
        for k, line in enumerate(words):
            canvas.text(left + columns * cell + 14, top + 12 + k * 17, line, "" if k == 0 else "dim")
    x, y = float(PAD), top + longest * cell + 28
    for kind, said in (("f0", "computed in this step"), ("t0", "its K and V are read from the cache")):
        canvas.rect(x, y - 11, 14, 14, kind)
        canvas.text(x + 20, y, said, "dim")
        x += 20 + text_width(said) + 18
    return canvas.svg(y + PAD)


def padding(records: Sequence[StepRecord], step: int, title: str) -> str:
    """What the rows of one step know, beside the rectangle that a padded cache would keep for them."""
    shown = [record for record in records if record.rows][step]
    hues = {life.id: life.hue for life in lives(records)}
    canvas = Canvas(WIDTH, title, "tokens of each row, and padding up to the longest")
    canvas.text(PAD, PAD + 10, title, "head")
    left, top = PAD + 60.0, PAD + 30.0
    longest = max(row.start + row.num_tokens for row in shown.rows)
    cell = min(18.0, (WIDTH - PAD - left - 130) / longest)
    used = 0
    for i, row in enumerate(shown.rows):
        y, known = top + i * LANE, row.start + row.num_tokens
        used += known
        canvas.text(left - 8, y + 14, row.id, "", "end")
        canvas.rect(left, y, longest * cell, CELL_HEIGHT, "pad")
        canvas.rect(left, y, known * cell, CELL_HEIGHT, "free")
        canvas.rect(left, y, known * cell, CELL_HEIGHT, f"t{hues[row.id]}")
        canvas.rect(left + row.start * cell, y, row.num_tokens * cell, CELL_HEIGHT, f"f{hues[row.id]}")
        canvas.text(left + longest * cell + 8, y + 14, f"{known} of {longest}", "dim")
    y = top + len(shown.rows) * LANE + 16
    total = longest * len(shown.rows)
    words = f"{total} KV slots in the rectangle, {used} hold a token: {100 * (total - used) / total:.0f} % is padding"
    canvas.text(left, y, words)
    y += 24
    x = left
    for kind, text in (("t0", "in the cache"), ("f0", "computed in this step"), ("pad", "padding")):
        canvas.rect(x, y - 11, 18, 14, kind)
        canvas.text(x + 24, y, text, "dim")
        x += 24 + text_width(text) + 18
    return canvas.svg(y + PAD)
