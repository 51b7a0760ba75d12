"""Pictures of the KV cache: which block is whose, step by step or at one moment.

What is where is known from the records alone (``observe/state.py``), and every record's own counts are compared with it on the
way: a picture of blocks that do not add up is not drawn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from minivllm.learn.canvas import Canvas, text_width
from minivllm.learn.draw_steps import CELL_HEIGHT, LANE, PAD, WIDTH, lives
from minivllm.observe.state import State
from minivllm.records import StepRecord

ROW: Final = 17  # height of a block's line in a story
CHIP: Final = 34  # width of a block of the pool in a snapshot


@dataclass(frozen=True)
class Frame:
    """The cache during a step: what its rows gained is theirs, and who ends with it has not let go yet."""

    tables: dict[str, tuple[int, ...]]  # of each request that runs, its blocks in order
    known: dict[str, int]  # and its tokens in them
    cached: dict[int, str]  # blocks that nobody holds and a lookup would find, and who wrote them

    def holders(self, block: int) -> tuple[str, ...]:
        """Who has the block in its table."""
        return tuple([name for name, table in self.tables.items() if block in table])


def frames(records: Sequence[StepRecord], block_size: int) -> Iterator[Frame]:
    """The cache during every step. KV group 0 alone. Raises RuntimeError when records do not add up."""
    state = State(block_size)
    wrote: dict[int, str] = {}
    for record in records:
        gone = {preemption.id for preemption in record.preempted}
        tables = {name: tuple(r.table[0]) for name, r in state.requests.items() if r.table and name not in gone}
        for row in record.rows:
            gained = row.blocks[0] if row.blocks else ()
            tables[row.id] = tables.get(row.id, ()) + gained
            wrote.update(dict.fromkeys(gained[row.cached // block_size :], row.id))
        state.apply(record)
        state.check(record)
        if record.rows:
            known = {row.id: row.start + row.num_tokens for row in record.rows}
            held = {block for table in tables.values() for block in table}
            yield Frame(tables, known, {block: wrote[block] for block in state.cached(0) if block not in held})


def story(records: Sequence[StepRecord], block_size: int, title: str, note: str = "") -> str:
    """A line a block, a column a step: held, shared, cached or free. ``note`` is said under the title."""
    shown = list(frames(records, block_size))
    hues = {life.id: life.hue for life in lives(records)}
    total = records[-1].blocks_total
    canvas = Canvas(WIDTH, title, note or "which request holds which block of the KV cache, step by step")
    canvas.text(PAD, PAD + 10, title, "head")
    if note:
        canvas.text(PAD, PAD + 29, note, "dim")
    left, top = PAD + 62.0, PAD + (44.0 if note else 26.0)
    cell = min(30.0, (WIDTH - PAD - left) / len(shown))
    for block in range(1, total + 1):
        y = top + (block - 1) * ROW
        canvas.text(left - 8, y + 12, f"block {block}" if block in (1, total) else str(block), "dim small", "end")
        column = 0
        for (holders, cached), run in groupby((frame.holders(block), frame.cached.get(block)) for frame in shown):
            columns = len(list(run))
            _span(canvas, (left + column * cell, y, columns * cell), holders, cached, hues)
            column += columns
    bottom = top + total * ROW + 14
    every = next(n for n in (1, 2, 5, 10, 20, 50) if n * cell >= 26)
    for step in range(0, len(shown), every):
        canvas.text(left + (step + 0.5) * cell, bottom, str(step), "dim small", "middle")
    canvas.text(left - 8, bottom, "step", "dim small", "end")
    return canvas.svg(_key(canvas, bottom + 28, shown) + PAD)


def _span(
    canvas: Canvas, place: tuple[float, float, float], holders: tuple[str, ...], cached: str | None, hues: dict[str, int]
) -> None:
    """One block over some steps in which nothing changed."""
    x, y, width = place
    x, width, height = x + 0.6, width - 1.2, ROW - 3.0
    if not holders:
        canvas.rect(x, y, width, height, "free")
        if cached is not None:
            canvas.rect(x, y, width, height, f"c{hues[cached]}")
        return
    for i, name in enumerate(holders):
        canvas.rect(x, y + i * height / len(holders), width, height / len(holders), f"f{hues[name]}")
    words = " + ".join(holders)
    wide = text_width(words, 11)
    if width > wide + 6 and len(holders) > 1:  # words on stripes need a ground of their own
        canvas.rect(x + 3, y + 1.5, wide + 4, height - 3, "plate")
        canvas.text(x + 5, y + 10.5, words, "on")
    elif width > wide + 6:
        canvas.text(x + 5, y + 10.5, words, f"on o{hues[holders[0]]}")


def _key(canvas: Canvas, y: float, shown: Sequence[Frame]) -> float:
    """What the shapes mean, of those that are there; the lowest line used."""
    entries = [("free", "free"), ("f0", "held")]
    every_table = [table for frame in shown for table in [[b for t in frame.tables.values() for b in t]]]
    if any(len(set(blocks)) < len(blocks) for blocks in every_table):
        entries.append(("two", "shared"))
    if any(frame.cached for frame in shown):
        entries.append(("c0", "cached: nobody holds it, a lookup would find it"))
    x = float(PAD)
    for kind, words in entries:
        if kind == "two":
            canvas.rect(x, y - 11, 18, 7, "f0")
            canvas.rect(x, y - 4, 18, 7, "f1")
        else:
            canvas.rect(x, y - 11, 18, 14, kind)
        canvas.text(x + 24, y, words, "dim")
        x += 24 + text_width(words) + 18
    return y


def tables(records: Sequence[StepRecord], step: int, block_size: int, title: str) -> str:
    """The block tables at one step, how full each block is, and where in the pool they lie."""
    frame = list(frames(records, block_size))[step]
    hues = {life.id: life.hue for life in lives(records)}
    total = records[-1].blocks_total
    canvas = Canvas(WIDTH, title, "block tables of the running requests, and the pool that their blocks are of")
    canvas.text(PAD, PAD + 10, title, "head")
    left, y = PAD + 44.0, PAD + 30.0
    wide = 76.0
    empty = slots = 0
    for name, table in frame.tables.items():
        hue, known = hues[name], frame.known[name]
        canvas.text(left - 8, y + 14, name, "", "end")
        for i, block in enumerate(table):
            x, used = left + i * (wide + 4), min(block_size, max(0, known - i * block_size))
            canvas.rect(x, y, wide, CELL_HEIGHT, "pad")
            canvas.rect(x, y, wide * used / block_size, CELL_HEIGHT, "plate")
            canvas.rect(x, y, wide * used / block_size, CELL_HEIGHT, f"t{hue}")
            canvas.text(x + 5, y + 14, str(block), "on")
        empty += len(table) * block_size - known
        slots += len(table) * block_size
        canvas.text(left + len(table) * (wide + 4) + 6, y + 14, f"{known} tokens", "dim")
        y += LANE + 2
    share = f"{100 * empty / slots:.0f} % is empty, all of it in last blocks"
    words = f"{slots} KV slots held, {slots - empty} hold a token: {share}"
    canvas.text(left, y + 14, words)
    y += 42
    canvas.text(PAD, y, "the pool")
    y += 10
    per_line = int((WIDTH - 2 * PAD) // CHIP)
    for block in range(1, total + 1):
        x = PAD + (block - 1) % per_line * CHIP
        line = y + (block - 1) // per_line * LANE
        holders = frame.holders(block)
        canvas.rect(x, line, CHIP - 4, CELL_HEIGHT, f"f{hues[holders[0]]}" if holders else "free")
        canvas.text(x + CHIP / 2 - 2, line + 14, str(block), f"on o{hues[holders[0]]}" if holders else "dim small", "middle")
    return canvas.svg(y + -(-total // per_line) * LANE + PAD - 4)
