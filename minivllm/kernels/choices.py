"""Which kernel serves which shape on which chip: a table that was measured once and ships with the project.

Nothing is timed when an engine starts. Two starts would then choose differently, and with the kernel the last bits of every
result would change. So the choice is a pure function of (operation, rows, shape, dtype, chip): what the chip's table says
(``triton/choices/*.json``, written by ``python -m benchmarks.gpu.products``) and, for what it does not list, a rule that its
user brings along. This file only reads tables; it knows no tensors.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "triton" / "choices"
# Products are chosen for these numbers of rows; a call takes the next one that holds its rows.
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class ProductChoice:
    """How one product of few rows is computed. ``kernel``: "library", or a kernel of ``triton/products.py`` and its sizes."""

    kernel: str
    block_m: int = 16  # rows of x in a tile
    block_n: int = 16  # outputs in a tile
    block_k: int = 64  # inputs that are read at once
    split_k: int = 1  # programs that share the inputs of a tile
    warps: int = 4
    stages: int = 3  # reads in flight
    ahead: int = 0  # inputs of each weight row that are fetched into the L2 cache before the kernel in front has ended


LIBRARY = ProductChoice("library")


@dataclass(frozen=True)
class ProductKey:
    """What a product's choice depends on besides the chip."""

    op: str  # linear, logits or gated_linear
    dtype: str  # of weights and activations, torch's name without "torch."
    num_out: int  # rows of the matrix; of a gated one, gate and up together
    num_in: int
    num_rows: int  # one of ROW_BUCKETS


@dataclass(frozen=True)
class ChoiceTable:
    """What was measured on one chip."""

    chip: str
    products: Mapping[ProductKey, ProductChoice] = field(default_factory=dict)

    def product(self, key: ProductKey) -> ProductChoice | None:
        """The measured choice. Both 16-bit types move the same bytes through the same units, so they share entries."""
        if key.dtype == "float16":
            key = ProductKey(key.op, "bfloat16", key.num_out, key.num_in, key.num_rows)
        return self.products.get(key)


def bucket_of(num_rows: int) -> int | None:
    """The smallest of ``ROW_BUCKETS`` that holds ``num_rows``; None for none and for more than the last."""
    return next((bucket for bucket in ROW_BUCKETS if bucket >= num_rows), None) if num_rows > 0 else None


def slug(chip: str) -> str:
    """The chip's name as part of a file name: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", chip.lower()).strip("-")


def load_choices(chip: str, folder: Path = FOLDER) -> ChoiceTable:
    """The table that ships for ``chip``; an empty one where nobody has measured yet."""
    path = folder / f"{slug(chip)}.json"
    return read_choices(path) if path.is_file() else ChoiceTable(chip)


def read_choices(path: Path) -> ChoiceTable:
    """Read a table. An entry that this version does not understand is an error: a table is part of the program."""
    written = json.loads(path.read_text())
    products: dict[ProductKey, ProductChoice] = {}
    for entry in written["products"]:
        key = ProductKey(**{name: entry.pop(name) for name in ("op", "dtype", "num_out", "num_in", "num_rows")})
        if key in products:
            raise ValueError(f"{path} has two entries for {key}")
        products[key] = ProductChoice(**entry)
    return ChoiceTable(written["chip"], products)


def write_choices(path: Path, table: ChoiceTable) -> None:
    """Write ``table`` with one entry a line, so that a new measurement can be read as a difference."""
    lines = [json.dumps(_entry(key, choice)) for key, choice in table.products.items()]
    head, body = json.dumps({"chip": table.chip})[:-1], ",\n  ".join(lines)
    path.write_text(f'{head},\n "products": [\n  {body}\n]}}\n')


def _entry(key: ProductKey, choice: ProductChoice) -> dict[str, Any]:
    """One line of the file. The library has no sizes."""
    return asdict(key) | ({"kernel": choice.kernel} if choice.kernel == LIBRARY.kernel else asdict(choice))
