"""Weights, from safetensors files straight into the decoder's parameters, in one pass.

Each layer reads only the slice that is its rank's, cast while it is copied. Every tensor of the checkpoint is accounted for:
loaded, or known to hold nothing; one that is missing, left over or of another shape is an error that names it, because a model
that is almost loaded speaks nonsense fluently. Pickle files are never opened.

``dummy`` weights come through the same way from a source of seeded random numbers, so they exercise the same code.
"""

import json
import mmap
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minivllm.errors import BrokenModelFolder
from minivllm.layers.source import ALL, PIECE_VALUES, Loadable, RowRange, TensorSource, Transposed
from minivllm.models.decoder import Decoder
from minivllm.models.hub import MAX_HEADER_BYTES, weight_files
from minivllm.models.spec import Weight, WeightNames

DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RANDOM_ROWS = 1024
STAGE_BYTES = 4 * PIECE_VALUES  # a piece of float32
_REMEDY = "fetch the model again"


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a safetensors file, which is opened for each reading: a file that stays mapped would stay in memory as far
    as it was read, and a start's peak would be the checkpoint and the model."""

    path: Path
    name: str
    shape: tuple[int, ...]

    def read(self, rows: slice = ALL, cols: slice = ALL) -> Tensor:
        """See ``TensorSource``."""
        with _open(self.path) as file:
            found = file.get_slice(self.name)
            return cast(Tensor, found[rows] if cols == ALL else found[rows, cols])


class Staging:
    """Two pages of pinned memory on the way to a GPU: one is filled, by all of torch's threads, while the other is copied to
    the device. (From memory that is not pinned the driver copies piece by piece, on one thread.) Written by one loading."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pages = [torch.empty(STAGE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]

    def send(self, piece: Tensor) -> Tensor:
        """``piece`` on the device, ordered before what the current stream does next."""
        if piece.nbytes > STAGE_BYTES:
            return piece.to(self._device)
        self._pages.reverse()
        self._copied.reverse()
        self._copied[0].synchronize()
        page = self._pages[0][: piece.nbytes].view(piece.dtype).view(piece.shape)
        sent = page.copy_(piece).to(self._device, non_blocking=True)
        self._copied[0].record()
        return sent


def make_staging(device: torch.device) -> Staging | None:
    """The way to ``device`` where there is one to go: weights for a CPU are read in place."""
    return Staging(device) if device.type == "cuda" else None


@dataclass(frozen=True)
class StagedTensor:
    """A tensor in a safetensors file that stays open, for weights that go to a GPU: what the host maps meanwhile is the page
    cache's, and does not stand beside the model."""

    file: Any
    name: str
    shape: tuple[int, ...]
    staging: Staging

    def read(self, rows: slice = ALL, cols: slice = ALL) -> Tensor:
        """See ``TensorSource``."""
        found = self.file.get_slice(self.name)
        return self.staging.send(found[rows] if cols == ALL else found[rows, cols])


@dataclass(frozen=True)
class RandomTensor:
    """A tensor of seeded random numbers; every rank slices the same ones.

    They are made where they are wanted, since a GPU makes billions in a second and a CPU in minutes. Each device has numbers
    of its own: on a CPU always those of float32, on another in the precision of the weights.
    """

    shape: tuple[int, ...]
    seed: int
    mean: float
    deviation: float
    dtype: torch.dtype
    device: torch.device

    def read(self, rows: slice = ALL, cols: slice = ALL) -> Tensor:
        """See ``TensorSource``."""
        start, stop, _ = rows.indices(self.shape[0])
        first = start // RANDOM_ROWS
        blocks = [self._block(index) for index in range(first, -(-stop // RANDOM_ROWS))]
        found = (blocks[0] if len(blocks) == 1 else torch.cat(blocks))[start - first * RANDOM_ROWS : stop - first * RANDOM_ROWS]
        return found if cols == ALL else found[:, cols]

    def _block(self, index: int) -> Tensor:
        """Some rows, from a seed of their own: a piece of a large tensor is made without the rest."""
        generator = torch.Generator(self.device).manual_seed((self.seed * 1_000_003 + index) % 2**63)
        num_rows = min(RANDOM_ROWS, self.shape[0] - index * RANDOM_ROWS)
        block = torch.empty((num_rows, *self.shape[1:]), dtype=self.dtype, device=self.device)
        return block.normal_(self.mean, self.deviation, generator=generator)


def load_checkpoint(decoder: Decoder, names: WeightNames, folder: Path) -> None:
    """Fill ``decoder`` from the safetensors files of ``folder``; raises ``BrokenModelFolder`` or ``PicklesOnly``."""
    staging = make_staging(decoder.final_norm.weight.device)
    found: dict[str, TensorSource] = {}
    with ExitStack() as opened:
        for path in weight_files(folder):
            with _open(path) as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no dict)
            kept = None if staging is None else opened.enter_context(_open(path))
            for name, shape in shapes.items():
                if name in found:
                    raise BrokenModelFolder(f"{path.name} holds the tensor {name} that another file holds too; {_REMEDY}.")
                found[name] = FileTensor(path, name, shape) if staging is None else StagedTensor(kept, name, shape, staging)
        _fill(decoder, names.places, _match(names, found))


def map_weights(folder: Path) -> tuple[mmap.mmap, ...]:
    """The weights' files in this process's memory, as far as the machine's reaches: who reads them while they are mapped, reads
    no disk. Raises ``BrokenModelFolder`` or ``PicklesOnly``."""
    mapped = []
    for path in weight_files(folder):
        if not path.stat().st_size:
            continue  # whoever loads it says what is wrong
        with path.open("rb") as file:
            mapped.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        mapped[-1].madvise(mmap.MADV_WILLNEED)
    return tuple(mapped)


def load_dummy(decoder: Decoder, names: WeightNames, seed: int) -> None:
    """Fill ``decoder`` with random weights, the same for a seed, scaled so that its greedy text is not one token."""
    like = decoder.final_norm.weight
    dtype = torch.float32 if like.device.type == "cpu" else like.dtype
    sources: dict[str, TensorSource] = {}
    for i, (name, places) in enumerate(names.places.items()):
        shape = list(_layer(decoder, places[0]).shape(places[0].part, places[0].tensor))
        shape[0] = max([shape[0], *(w.rows[1] for w in places if w.rows)])
        if places[0].transposed:
            shape.reverse()
        mean, deviation = _spread(tuple(shape), places[0])
        sources[name] = RandomTensor(tuple(shape), seed * 1_000_003 + i, mean, deviation, dtype, like.device)
    _fill(decoder, names.places, sources)


def _spread(shape: tuple[int, ...], place: Weight) -> tuple[float, float]:
    """Mean and deviation fit for the place: norms near one, matrices by their inputs, tables small beside what layers add."""
    if place.module.endswith("norm"):
        return 1.0 if place.tensor == "weight" else 0.0, 0.03
    if len(shape) == 1:
        return 0.0, 0.03
    if place.module in ("embedding", "positions", "head_table"):
        return 0.0, 0.3
    num_in = shape[0] if place.transposed else shape[1]
    return 0.0, float(2.0 * num_in**-0.5)


def checkpoint_dtype(folder: Path) -> str | None:
    """The precision of the first float tensor of the checkpoint, from the file's header; None for one that is not served."""
    header = weight_files(folder)[0].open("rb")
    with header:
        length = int.from_bytes(header.read(8), "little")
        try:
            tensors = json.loads(header.read(min(length, MAX_HEADER_BYTES)))
            kinds = {t["dtype"] for name, t in tensors.items() if name != "__metadata__"}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise BrokenModelFolder(f"{header.name} is not a whole safetensors file; {_REMEDY}.") from None
    found = [name for kind, name in (("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32")) if kind in kinds]
    return found[0] if found else None


def _open(path: Path) -> Any:
    """Open a safetensors file; raises ``BrokenModelFolder``."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise BrokenModelFolder(f"{path} is truncated or not a safetensors file ({error}); {_REMEDY}.") from None


def _match(names: WeightNames, found: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    """Bring the checkpoint's names to the expected ones; raises ``BrokenModelFolder`` for missing and unexpected tensors."""
    plain = {name.removeprefix(names.optional_prefix): source for name, source in found.items()}
    ignored = [re.compile(pattern) for pattern in names.ignored]
    kept = {n: s for n, s in plain.items() if n in names.places or not any(p.fullmatch(n) for p in ignored)}
    for what, odd in (("lacks", names.places.keys() - kept.keys()), ("has unexpected", kept.keys() - names.places.keys())):
        if odd:
            shown = ", ".join(sorted(odd)[:3]) + (", ..." if len(odd) > 3 else "")
            raise BrokenModelFolder(
                f"The checkpoint {what} {len(odd)} tensors ({shown}), so it is not the model of its config.json; {_REMEDY}."
            )
    return kept


def _fill(decoder: Decoder, places: Mapping[str, tuple[Weight, ...]], sources: Mapping[str, TensorSource]) -> None:
    """Load every place from its source, check that none is left out, and finish every layer."""
    due = {(path, *pair) for path, layer in _layers(decoder) for pair in layer.tensors()}
    for name, weights in places.items():
        whole = 0  # rows of the checkpoint tensor that the places account for
        for place in weights:
            source: TensorSource = Transposed(sources[name]) if place.transposed else sources[name]
            rows = source.shape[0] if source.shape else 0
            if place.rows is not None:
                source = RowRange(source, *place.rows)
            expected = _layer(decoder, place).shape(place.part, place.tensor)
            whole += expected[0]
            if source.shape != expected:
                raise BrokenModelFolder(
                    f"Tensor {name} has shape {source.shape} where config.json leads to {expected}; {_REMEDY}."
                )
            try:
                _layer(decoder, place).load(place.part, place.tensor, source)
            except SafetensorError as error:
                raise BrokenModelFolder(f"Tensor {name} cannot be read ({error}); {_REMEDY}.") from None
            due.remove((place.module, place.part, place.tensor))
        if whole != rows:
            raise BrokenModelFolder(f"Tensor {name} has {rows} rows where config.json leads to {whole}; {_REMEDY}.")
    if due:
        raise RuntimeError(f"no checkpoint name leads to {sorted(due)[0]}: the architecture's weight names are incomplete")
    for _, layer in _layers(decoder):
        layer.finish()


def _layers(decoder: Decoder) -> Iterator[tuple[str, Loadable]]:
    """Every layer with weights, and its path."""
    for path, module in decoder.named_modules():
        if hasattr(module, "tensors"):
            yield path, cast(Loadable, module)


def _layer(decoder: Decoder, place: Weight) -> Loadable:
    """The layer that a weight belongs to."""
    return cast(Loadable, decoder.get_submodule(place.module))
