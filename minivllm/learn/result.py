"""What a run of the ladder left behind: the content of ladder.json, and what follows from its numbers.

The file holds counts and times only; tables, pictures and sentences are made from it, here or on another machine. No torch.
"""

from pathlib import Path
from typing import Any, Literal

import msgspec

from minivllm.errors import InvalidOption
from minivllm.learn.arithmetic import Cost
from minivllm.learn.workload import Workload


class Percentiles(msgspec.Struct, frozen=True):
    """Of some times, in seconds."""

    p50: float
    p99: float


class Agreement(msgspec.Struct, frozen=True):
    """How a rung's texts compare with those of the first rung that has them."""

    compared: int
    equal: int
    near_ties: int  # they part where the model's two best tokens are as good as equal
    different: int  # they part elsewhere
    widest: float = 0.0  # where texts part: the most that a token's logit is behind the best one's


class RungResult(msgspec.Struct, frozen=True, kw_only=True):
    """One rung's counts and times."""

    name: str
    title: str
    idea: str
    left_out: str = ""  # why it was not run
    options: dict[str, Any] = {}  # of the engine
    requests: int = 0  # that were served
    cut: int = 0  # of these, texts cut short when the rung's time was over twice
    output_tokens: int = 0
    needed: int = 0  # tokens that have to be computed once: prompts, and outputs but for each last token
    recomputed: int = 0  # tokens computed again
    found: int = 0  # prompt tokens that the prefix cache had
    elapsed_s: float = 0.0  # with work to do
    cost: Cost = Cost()
    predicted_s: float = 0.0  # by the roofline, call by call
    memory_s: float = 0.0  # of that, calls that wait for memory
    ttft_s: Percentiles = Percentiles(0.0, 0.0)
    itl_s: Percentiles = Percentiles(0.0, 0.0)
    agreement: Agreement = Agreement(0, 0, 0, 0)
    notes: tuple[str, ...] = ()

    @property
    def ran(self) -> bool:
        """There are figures."""
        return not self.left_out

    @property
    def tokens_per_s(self) -> float:
        """Output tokens a second."""
        return self.output_tokens / self.elapsed_s

    @property
    def flops_per_s(self) -> float:
        """What the arithmetic units really did."""
        return self.cost.flops / self.elapsed_s

    @property
    def intensity(self) -> float:
        """Operations for each byte moved."""
        return self.cost.flops / self.cost.bytes_moved

    @property
    def waits_for_memory(self) -> bool:
        """Most of the predicted time goes to calls that wait for memory."""
        return self.memory_s > self.predicted_s / 2

    @property
    def beyond_s(self) -> float:
        """Time of a call that neither arithmetic nor memory explains: launching, planning, copying, Python."""
        return (self.elapsed_s - self.predicted_s) / self.cost.calls

    def each(self, amount: float) -> float:
        """An amount for each output token: rungs that served different numbers of requests can be compared."""
        return amount / self.output_tokens


class Machine(msgspec.Struct, frozen=True):
    """Where it ran, and what that can do at most."""

    device: str
    threads: int
    torch: str
    flops_per_s: float
    bytes_per_s: float

    @property
    def ridge(self) -> float:
        """Operations for each byte from which on arithmetic is the limit."""
        return self.flops_per_s / self.bytes_per_s


class ModelFacts(msgspec.Struct, frozen=True):
    """The model in a few numbers."""

    name: str
    architecture: str
    params: int
    layers: int
    dtype: str
    weight_bytes: int  # read by a step
    kv_bytes: int  # K and V of a token
    random: bool


class Ladder(msgspec.Struct, frozen=True):
    """A whole run."""

    machine: Machine
    model: ModelFacts
    workload: Workload
    batch_size: int
    chunk_tokens: int
    max_rung_s: float
    rounds: int  # of which the fastest counts, for each rung
    rungs: tuple[RungResult, ...]
    format: Literal["mini-vllm ladder"] = "mini-vllm ladder"
    version: Literal[1] = 1

    @property
    def ran(self) -> tuple[RungResult, ...]:
        """The rungs with figures."""
        return tuple(rung for rung in self.rungs if rung.ran)


def write(ladder: Ladder, path: Path) -> None:
    """Write ladder.json; raises ``InvalidOption``."""
    write_file(path, msgspec.json.format(msgspec.json.encode(ladder), indent=1) + b"\n")


def write_file(path: Path, content: bytes) -> None:
    """Write a file of the report; raises ``InvalidOption``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise InvalidOption(f"{path} cannot be written ({error.strerror}); give another --output.") from None


def read(path: Path) -> Ladder:
    """Read ladder.json; raises ``InvalidOption``."""
    try:
        ladder = msgspec.json.decode(path.read_bytes(), type=Ladder)
    except OSError as error:
        raise InvalidOption(f"{path} cannot be read ({error.strerror}); give the ladder.json of a run.") from None
    except msgspec.DecodeError as error:
        raise InvalidOption(f"{path} is no ladder.json of this version ({error}); run `mini-vllm learn` again.") from None
    if not ladder.ran:
        raise InvalidOption(f"{path} holds no rung that ran; run `mini-vllm learn` again.")
    return ladder
