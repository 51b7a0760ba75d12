"""Reading a ``config.json`` in Hugging Face layout: typed look-ups, with an error that names the field at fault.

Old and new spellings are brought together here (``rope_theta`` and ``rope_scaling`` against transformers 5's
``rope_parameters``; ``torch_dtype`` against ``dtype``), so that an architecture's file says only what is its own.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minivllm.errors import BrokenModelFolder, UnsupportedModel
from minivllm.layers.rope import RopeKind, RopeSpec
from minivllm.model_files import read_json

_MISSING = object()
_ROPE_KINDS: Mapping[str, RopeKind] = {"default": "default", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}


MAX_SIZE = 2**31 - 1
MAX_LAYERS = 10_000  # each has a dozen names, which are written down before anything else is looked at


class HFConfig:
    """A model's ``config.json`` and ``generation_config.json``. Never written."""

    def __init__(self, values: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> None:
        self.values, self.generation = values, generation or {}

    @staticmethod
    def read(folder: Path) -> "HFConfig":
        """Read a model's folder; raises ``BrokenModelFolder``."""
        generation = folder / "generation_config.json"
        return HFConfig(read_json(folder / "config.json"), read_json(generation) if generation.is_file() else None)

    @property
    def architecture(self) -> str:
        """The class name that the folder gives for its model; raises ``BrokenModelFolder`` when there is none."""
        names = self.values.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise BrokenModelFolder("config.json does not name the model's architecture; it needs an 'architectures' list.")
        return names[0]

    @property
    def dtype(self) -> str | None:
        """Name of the precision that the weights were saved in, where it is given."""
        found = self.values.get("dtype") or self.values.get("torch_dtype")
        return str(found).removeprefix("torch.") if found else None

    def integer(self, name: str, default: Any = _MISSING, most: int = MAX_SIZE) -> int:
        """A whole number from 1 to ``most``. A null counts as absent."""
        found = self._get(name, default)
        if isinstance(found, bool) or not isinstance(found, int) or not 1 <= found <= most:
            span = f"from 1 to {most}" if isinstance(found, int) and found > most else "over 0"
            raise BrokenModelFolder(f"config.json: {name} must be a whole number {span}, not {found!r}.")
        return found

    def optional_integer(self, name: str) -> int | None:
        """A whole number over 0, or None where it is absent or null."""
        return None if self.values.get(name) is None else self.integer(name)

    def number(self, name: str, default: Any = _MISSING) -> float:
        """A number. A null counts as absent."""
        found = self._get(name, default)
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise BrokenModelFolder(f"config.json: {name} must be a number, not {found!r}.")
        return float(found)

    def flag(self, name: str, default: bool) -> bool:
        """True or false. A null counts as absent."""
        found = self._get(name, default)
        if not isinstance(found, bool):
            raise BrokenModelFolder(f"config.json: {name} must be true or false, not {found!r}.")
        return found

    def text(self, name: str, default: Any = _MISSING) -> str:
        """A text. A null counts as absent."""
        found = self._get(name, default)
        if not isinstance(found, str):
            raise BrokenModelFolder(f"config.json: {name} must be a text, not {found!r}.")
        return found

    def refuse(self, **unserved: Any) -> None:
        """Raise ``UnsupportedModel`` for a field that is there with another value than the one that is served."""
        for name, served in unserved.items():
            found = self.values.get(name)
            if found is not None and found != served:
                raise UnsupportedModel(f"config.json sets {name} to {found!r}, which is not served; only {served!r} is.")

    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a text: generation_config's (a number or a list), else config's."""
        for source in (self.generation, self.values):
            found = source.get("eos_token_id")
            if found is not None:
                ids = found if isinstance(found, list) else [found]
                if not all(type(i) is int for i in ids):
                    raise BrokenModelFolder(f"eos_token_id must be a token id or a list of them, not {found!r}.")
                return tuple(dict.fromkeys(ids))
        return ()

    def bos_id(self) -> int | None:
        """The token that begins a text, if there is one."""
        found = self.values.get("bos_token_id")
        return found if type(found) is int else None

    def _get(self, name: str, default: Any) -> Any:
        """The value, or the default where it is absent or null; raises ``BrokenModelFolder`` without a default."""
        found = self.values.get(name)
        if found is not None:
            return found
        if default is _MISSING:
            raise BrokenModelFolder(f"config.json has no {name}, which this architecture needs; fetch the model again.")
        return default


def read_rope(config: HFConfig, head_dim: int, max_positions: int) -> tuple[RopeSpec, int, tuple[str, ...]]:
    """Return the rotary positions, the longest context they are meant for, and notes; raises ``UnsupportedModel``."""
    found = config.values.get("rope_parameters") or config.values.get("rope_scaling") or {}
    if any(isinstance(v, dict) for v in found.values()):
        raise UnsupportedModel("rope_parameters differ between kinds of layers, which is not served.")
    fields = HFConfig({**config.values, **found, "rope_type": found.get("rope_type") or found.get("type") or "default"})
    kind, theta = fields.text("rope_type"), fields.number("rope_theta", 10000.0)
    rotary_dim = int(head_dim * fields.number("partial_rotary_factor", 1.0))
    plain = RopeSpec(rotary_dim, theta)
    if kind == "dynamic":  # up to the trained length it turns as the default does; beyond, it turns everything anew each step
        return plain, max_positions, (f"Dynamic rope scaling is not served, so the context stays at {max_positions} tokens.",)
    if kind not in _ROPE_KINDS:
        raise UnsupportedModel(f"rope_type {kind!r} is not served; served are {', '.join(_ROPE_KINDS)}.")
    if kind == "default":
        return plain, max_positions, ()
    factor = fields.number("factor")
    if kind == "linear":
        return RopeSpec(rotary_dim, theta, "linear", factor), int(max_positions * factor), ()
    original = fields.integer("original_max_position_embeddings", max_positions)
    if kind == "llama3":
        ramp = (fields.number("low_freq_factor"), fields.number("high_freq_factor"))
        return RopeSpec(rotary_dim, theta, "llama3", factor, original, *ramp), max_positions, ()
    return _yarn(fields, plain, factor, original), max(max_positions, int(original * factor)), ()


def _yarn(fields: HFConfig, plain: RopeSpec, factor: float, original: int) -> RopeSpec:
    """The yarn variant; its attention factor is given, or follows from the stretch."""

    def stretch(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, all_dims = fields.number("mscale", 0.0), fields.number("mscale_all_dim", 0.0)
    derived = stretch(mscale) / stretch(all_dims) if mscale and all_dims else stretch(1.0)
    return RopeSpec(
        plain.rotary_dim,
        plain.theta,
        "yarn",
        factor,
        original,
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        attention_factor=fields.number("attention_factor", derived),
        truncate=fields.flag("truncate", True),
    )
