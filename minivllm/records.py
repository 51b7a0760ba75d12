"""What the engine tells of its steps: one ``StepRecord`` each, beside the tokens that the step gave.

Metrics, the page, traces and explanations read these and nothing else. They are immutable and hold plain values, as all of
``types.py`` does, and tell differences: a reader who has all of them knows at every moment who runs and what is in every block
(``observe/state.py``).
"""

from typing import Literal

import msgspec

from minivllm.types import BlockIds, FinishReason, TokenEvent

PreemptionReason = Literal[
    "blocks",  # another request needed its blocks
    "failed step",  # it was in a step that failed, and starts over
    "not finite",  # it may have read K/V of a request whose numbers were not finite, and starts over
    "trial",  # others are tried, to find out by whose fault a step failed
]
# Why requests wait: the first word of a reason. rows: max_num_seqs run; blocks: the KV cache is full; budget: a step's tokens
# are taken; order: one ahead was overtaken often enough; priority: others of a better priority came later and run; trial: as
# above; memory: the device ran out of it, so fewer run for a while; in flight: a step that still writes for it is not done.
WAIT_CODES = ("rows", "blocks", "budget", "order", "priority", "trial", "memory", "in flight")


class FinishedTimes(msgspec.Struct, frozen=True, gc=False):
    """The life of a finished request, for histograms. Times are on time.monotonic()."""

    id: str
    reason: FinishReason
    num_prompt: int
    num_cached: int
    num_output: int
    max_tokens: int
    num_preemptions: int
    arrival_s: float
    scheduled_s: float | None  # None: never ran
    first_token_s: float | None
    finished_s: float


class RowRecord(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """One row of one step, as it was planned."""

    id: str
    start: int  # position of the first token computed
    num_tokens: int
    kind: Literal["prefill", "decode"]
    blocks: BlockIds = ()  # that its table gained with this step, in order; of one that begins to run, the whole table
    cached: int = 0  # of one that begins to run: tokens that were there already, in the prefix cache or with its fork's parent
    tokens: tuple[int, ...] = ()  # from ``start`` on, those that were known before the step; () where tokens are not recorded


class ArrivalRecord(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A request that the scheduler got to know."""

    id: str
    arrival_s: float
    num_prompt: int
    max_tokens: int
    num_prior: int = 0  # output tokens that it brings of another engine's life
    priority: int = 0
    parent: str | None = None  # the request whose blocks it may share as its fork
    tenant: str = ""
    received_s: float | None = None  # when the server had its first byte, on time.monotonic()


class WaitRecord(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Why a request had no row in a step. ``reason`` is "code: sentence"; ``WAIT_CODES`` has the codes."""

    id: str
    reason: str
    behind: tuple[str, ...] = ()  # who is in its way; (): everyone who runs


class PreemptionRecord(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A request that lost its place, and will go on later with the tokens it has."""

    id: str
    reason: PreemptionReason
    by: str | None = None  # who needed its blocks
    num_computed: int = 0  # tokens whose K/V it let go


class StepRecord(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Everything that metrics, pages, traces and explanations know of a step. They read this and nothing else.

    ``waits`` names a reason for each waiting request that was looked at; the others wait for ``rest_waits``.

    With overlap, later steps may be planned by the time that a step's result is in. ``preempted``, ``released``, ``freed`` and
    the counts of blocks are then of the moment just before the next step was planned: so who takes the records in their order
    (first what rows gained, then what was released) always has the tables that those counts are of. ``observe/state.py``
    does that.
    """

    step: int  # -1: there was none, but something changed
    scheduled_s: float
    launched_s: float
    finished_s: float
    collected_s: float
    rows: tuple[RowRecord, ...]
    num_running: int
    num_waiting: int
    waits: tuple[WaitRecord, ...]
    rest_waits: str
    blocks_total: int
    blocks_free: int
    blocks_cached: int  # unreferenced, findable
    blocks_referenced: int
    prefix_queries: int  # tokens looked up in the prefix cache since the record before
    prefix_hits: int  # of those, tokens found
    num_prompt_tokens: int  # prompt tokens computed in this step
    num_output_tokens: int
    ttft_s: tuple[float, ...]  # of rows whose first token came in this step
    itl_s: tuple[float, ...]  # of the other rows that got a token
    finished: tuple[FinishedTimes, ...]
    rest_behind: tuple[str, ...] = ()  # who is in the way of the others; (): everyone who runs
    num_paused: int = 0  # requests whose reader does not read: they hold neither rows nor blocks
    # What follows is of the time since the record before.
    arrived: tuple[ArrivalRecord, ...] = ()
    paused: tuple[str, ...] = ()
    resumed: tuple[str, ...] = ()
    preempted: tuple[PreemptionRecord, ...] = ()
    released: tuple[str, ...] = ()  # whose block tables emptied: they ended, were preempted, are paused
    freed: tuple[tuple[int, int], ...] = ()  # (group, block) that nobody holds now and no lookup would find
    outputs: tuple[tuple[int, ...], ...] = ()  # by row, tokens that its text got; () where tokens are not recorded
    life: int | None = None  # on the first record of an engine: how many were before it. Nothing of these is left


class EngineOutput(msgspec.Struct, frozen=True, gc=False, tag="output"):
    """All that the engine says after a step, in one message."""

    events: tuple[TokenEvent, ...]
    record: StepRecord | None = None
