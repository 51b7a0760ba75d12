"""Which attention backend serves a model: the first in order of preference that has no reason against it."""

from importlib import import_module
from typing import cast

from minivllm.attention.base import AttentionBackend, AttnNeed, BackendClass
from minivllm.errors import UnsupportedModel
from minivllm.kernels.ops import Ops

# Fastest first. Imported when asked, so that a backend's own imports cost nothing where it is not considered.
PREFERENCE = (
    "minivllm.attention.native:NativeAttention",
    "minivllm.attention.triton:TritonAttention",
    "minivllm.attention.torch_sdpa:TorchAttention",
    "minivllm.attention.invariant:InvariantAttention",
)


def select_backend(need: AttnNeed, ops: Ops) -> tuple[AttentionBackend, list[str]]:
    """Return the backend and a sentence for each one passed over. Raises ``UnsupportedModel`` when none can serve."""
    passed_over: list[str] = []
    for place in PREFERENCE:
        module, name = place.split(":")
        backend = cast(BackendClass, getattr(import_module(module), name))
        reasons = backend.missing(need, ops)
        if not reasons:
            return backend(need, ops), passed_over
        passed_over.append(f"Attention backend {backend.name} was passed over: {'; '.join(reasons)}.")
    raise UnsupportedModel(f"No attention backend can serve this model here. {' '.join(passed_over)}")
