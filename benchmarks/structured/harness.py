"""Schemas and instances, and how an engine of grammars is measured with them. Needs numpy alone: every contender uses it.

An engine is a function from a schema to a ``Walk``; it raises for a schema that it does not take. It runs in a forked child, so
that a schema on which it hangs or crashes costs that schema and not the run.
"""

import json
import lzma
import multiprocessing as mp
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

TIMEOUT_S = 20.0  # of one schema with its instances


class Walk(Protocol):
    """A place in a text that follows a schema."""

    def mask(self) -> None:
        """Compute which tokens may come next."""

    def accept(self, token: int) -> bool:
        """Take a token; False if it may not come."""

    def may_end(self) -> bool:
        """Whether the text may end here."""


@dataclass
class Answer:
    """What one schema gave."""

    refusal: str | None = None
    compile_s: float = 0.0
    mask_s: list[float] = field(default_factory=list)
    right: Counter[tuple[bool, bool]] = field(default_factory=Counter)  # (instance is valid, answer is right) -> instances


Engine = Callable[[dict[str, Any]], Callable[[], Walk]]


def data_sets(folder: Path, limit: int | None) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Name and records of each data set; with a limit, that many, evenly spread."""
    for path in sorted(folder.glob("*.jsonl.xz")):
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            records = [json.loads(line) for line in lines]
        step = 1 if limit is None else max(1, -(-len(records) // limit))
        yield path.name.removesuffix(".jsonl.xz"), records[::step]


def names_in_order(schema: Any) -> dict[str, int]:
    """Each name of a property -> its rank: a schema's own first, then those of its parts."""
    names: dict[str, int] = {}
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            for word in ("properties", "required"):
                known = node.get(word)
                for name in known if isinstance(known, dict | list) else ():
                    if isinstance(name, str):
                        names.setdefault(name, len(names))
            waiting += reversed(list(node.values()))
        elif isinstance(node, list):
            waiting += reversed(node)
    return names


def in_schema_order(value: Any, schemas: list[Any], root: Any, rank: dict[str, int]) -> Any:
    """An instance with its properties in the order of the schemas of its place, where that is plain to see."""
    here = all_parts(schemas, root)
    if isinstance(value, list):
        items = [part["items"] for part in here if "items" in part]
        return [in_schema_order(item, items, root, rank) for item in value]
    if not isinstance(value, dict):
        return value
    inside: dict[str, list[Any]] = {}
    for part in here:
        if isinstance(known := part.get("properties"), dict):
            for name, schema in known.items():
                inside.setdefault(name, []).append(schema)
    order = {name: i for i, name in enumerate(inside)}
    for part in here:
        for name in value:
            patterns = part.get("patternProperties") or {}
            fitting = [schema for pattern, schema in patterns.items() if re.search(pattern, name)]
            if name not in (part.get("properties") or {}):
                inside.setdefault(name, []).extend(fitting or [part.get("additionalProperties")])
    ordered = sorted(value, key=lambda name: (name not in order, order.get(name, 0), rank.get(name, len(rank))))
    return {name: in_schema_order(value[name], inside.get(name, []), root, rank) for name in ordered}


def all_parts(schemas: list[Any], root: Any) -> list[dict[str, Any]]:
    """Schemas, and what they refer to and are put together from, in order."""
    found: list[dict[str, Any]] = []
    waiting = list(schemas)
    while waiting:
        part = waiting.pop(0)
        if not isinstance(part, dict) or any(part is known for known in found):
            continue
        found.append(part)
        more = [choice for word in ("allOf", "anyOf", "oneOf") for choice in part.get(word) or ()]
        if isinstance(ref := part.get("$ref"), str) and ref.startswith("#"):
            more.insert(0, at_pointer(root, ref))
        waiting = more + waiting
    return found


def at_pointer(root: Any, ref: str) -> Any:
    """What a local reference points at; {} if nothing."""
    node = root
    for step in ref[1:].split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        node = node.get(step) if isinstance(node, dict) else None
    return {} if node is None else node


def answer(engine: Engine, encode: Callable[[str], list[int]], record: dict[str, Any]) -> Answer:
    """Compile one schema and walk along its instances."""
    schema, made = record["schema"], Answer()
    began = time.perf_counter()
    try:
        begin = engine(schema)
    except Exception as error:
        made.refusal = " ".join(str(error).split())[:200] or type(error).__name__
        return made
    made.compile_s = time.perf_counter() - began
    rank = names_in_order(schema)
    for test in record["tests"]:
        text = json.dumps(in_schema_order(test["data"], [schema], schema, rank), ensure_ascii=False)
        walk, taken = begin(), True
        for token in encode(text):
            if test["valid"]:
                before = time.perf_counter()
                walk.mask()
                made.mask_s.append(time.perf_counter() - before)
            if not walk.accept(token):
                taken = False
                break
        made.right[test["valid"], (taken and walk.may_end()) == test["valid"]] += 1
    return made


def _serve(engine: Engine, encode: Callable[[str], list[int]], records: Sequence[dict[str, Any]], pipe: Connection) -> None:
    for record in records:
        pipe.send(answer(engine, encode, record))


def answers(engine: Engine, encode: Callable[[str], list[int]], records: Sequence[dict[str, Any]]) -> list[Answer]:
    """An answer for each record, from children that may be lost."""
    made: list[Answer] = []
    fork = mp.get_context("fork")
    while len(made) < len(records):
        ours, theirs = fork.Pipe()
        child = fork.Process(target=_serve, args=(engine, encode, records[len(made) :], theirs), daemon=True)
        child.start()
        theirs.close()
        while len(made) < len(records):
            try:
                if not ours.poll(TIMEOUT_S):
                    made.append(Answer(refusal=f"over {TIMEOUT_S:.0f} s"))
                    break
                made.append(ours.recv())
            except EOFError:
                made.append(Answer(refusal="crashed"))
                break
        child.kill()
        child.join()
    return made


@dataclass
class Row:
    """A line of the table."""

    name: str
    schemas: int
    compiled: float
    valid_taken: float
    invalid_refused: float
    compile_p50_ms: float
    compile_p99_ms: float
    mask_p50_us: float
    mask_p99_us: float
    masks: int
    valid: int
    invalid: int

    HEAD = "| data set | schemas | compiled | valid taken | invalid refused | compile p50 / p99, ms | mask p50 / p99, us |"

    def line(self) -> str:
        """As Markdown."""
        return (
            f"| {self.name} | {self.schemas:,} | {self.compiled:.1%} | {share(self.valid_taken)} of {self.valid:,} | "
            f"{share(self.invalid_refused)} of {self.invalid:,} | {self.compile_p50_ms:.1f} / {self.compile_p99_ms:.0f} | "
            f"{self.mask_p50_us:.0f} / {self.mask_p99_us:.0f} |"
        )


def share(value: float) -> str:
    """A share, or a dash where there was nothing."""
    return "-" if value != value else f"{value:.1%}"


def row(name: str, made: Sequence[Answer]) -> Row:
    """The figures of some answers."""
    good = [a for a in made if a.refusal is None]
    right: Counter[tuple[bool, bool]] = sum((a.right for a in good), Counter())
    valid, invalid = right[True, True] + right[True, False], right[False, True] + right[False, False]
    compile_ms = np.array([a.compile_s for a in good] or [np.nan]) * 1e3
    mask_us = np.array([t for a in good for t in a.mask_s] or [np.nan]) * 1e6
    return Row(
        name=name, schemas=len(made), compiled=len(good) / max(1, len(made)),
        valid_taken=right[True, True] / valid if valid else float("nan"),
        invalid_refused=right[False, True] / invalid if invalid else float("nan"),
        compile_p50_ms=float(np.percentile(compile_ms, 50)), compile_p99_ms=float(np.percentile(compile_ms, 99)),
        mask_p50_us=float(np.percentile(mask_us, 50)), mask_p99_us=float(np.percentile(mask_us, 99)),
        masks=len(mask_us), valid=valid, invalid=invalid,
    )  # fmt: skip


def measure(engine: Engine, encode: Callable[[str], list[int]], folder: Path, limit: int | None) -> dict[str, Any]:
    """Measure everything and print the table; gives the figures."""
    print(Row.HEAD + "\n|---|--:|--:|--:|--:|--:|--:|", flush=True)
    everything: list[Answer] = []
    rows = []
    for name, records in data_sets(folder, limit):
        made = answers(engine, encode, records)
        everything += made
        rows.append(row(name, made))
        print(rows[-1].line(), flush=True)
    rows.append(row("all", everything))
    print(rows[-1].line(), flush=True)
    reasons = Counter(a.refusal for a in everything if a.refusal is not None)
    figures = [{key: None if value != value else value for key, value in vars(r).items()} for r in rows]
    return {"rows": figures, "refusals": dict(reasons.most_common(25))}
