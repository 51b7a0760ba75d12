"""Every request and where it is: waiting, running on a row and holding blocks, or paused.

The moves between those places are here, so that each is whole: a request that leaves gives up its row, its blocks and its names
in one call. When to move is decided elsewhere (``planner.py``, ``scheduler.py``).
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

from minivllm.kv.allocator import Allocator
from minivllm.scheduler.policy import POLICIES, by_claim
from minivllm.scheduler.request import NO_ROW, Request
from minivllm.scheduler.sharing import Sharing
from minivllm.scheduler.trials import Trials
from minivllm.types import GenerateRequest

# What a request that begins again keeps.
_KEPT = (
    "claim", "token_ids", "guide", "repetition", "cached", "evictions", "failures", "forgiven", "prompt_told", "scheduled_s",
    "first_token_s", "last_token_s",
)  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What a step and a request may hold, and what is told of them."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()
    batching_policy: str = "mixed"
    scheduling_policy: str = "fcfs"
    num_draft_tokens: int = 0  # positions verified beyond the next one
    record_tokens: bool = False  # whether the records of steps tell tokens


class Book:
    """Places of all requests. Written by ``Scheduler`` and its ``Planner``, in one thread."""

    def __init__(self, limits: Limits, kv: Allocator) -> None:
        self.limits = limits
        self.kv = kv
        self.waiting = POLICIES[limits.scheduling_policy]()
        self.running: list[Request] = []  # sorted by claim
        self.paused: dict[int, Request] = {}  # by uid: nobody reads their text, so they hold tokens and nothing else
        self.live: dict[int, Request] = {}
        self.by_id: dict[str, Request] = {}
        self.free_rows = list(range(limits.max_num_seqs - 1, -1, -1))
        self.rows_to_free: list[int] = []  # not told to the runner yet
        self.released: list[str] = []  # ids of those that gave up their blocks; no record says so yet
        self.sharing = Sharing(kv.block_size)
        self.trials = Trials()
        self._next_uid = 0

    def is_live(self, request: Request) -> bool:
        """False for a request that ended, or that began again under another uid."""
        return self.live.get(request.uid) is request

    def make(self, spec: GenerateRequest) -> Request:
        """A request that is in no place yet."""
        request = Request(self._next_uid, spec, self.limits.eos_token_ids, self.limits.max_model_len)
        request.claim = self.waiting.claim(request)
        return request

    def enter(self, request: Request) -> None:
        """Queue a request that was made. What can fail comes first: then nothing of it is left."""
        self.kv.open(request.uid, request.spec.cache_salt, request.spec.lora or "")
        self.waiting.add(request)
        self._next_uid = request.uid + 1
        self.live[request.uid] = request
        self.by_id[request.spec.id] = request

    def run(self, requests: list[Request]) -> None:
        """Waiting requests that were given the last free rows, in order, are running now."""
        for request in requests:
            self.waiting.remove(request)
            insort(self.running, request, key=by_claim)
            full = request.num_known_at_start // self.kv.block_size
            self.sharing.take(request.row, self.kv.leading_blocks(request.uid, full))
        if requests:
            del self.free_rows[-len(requests) :]

    def preempt(self, request: Request) -> None:
        """Blocks and row go back; the tokens stay. Results in flight are still appended before it runs again."""
        self._stop_running(request)
        request.num_preemptions += 1
        self.waiting.add(request)

    def pause(self, request: Request) -> None:
        """As ``preempt``, but it does not run again before ``resume``. It is no suspect meanwhile: trials would wait for it."""
        self.trials.leave(request.uid)
        if request.running:
            self._stop_running(request)
        else:
            self.waiting.remove(request)
        self.paused[request.uid] = request

    def resume(self, request: Request) -> None:
        """A paused request waits its turn again."""
        del self.paused[request.uid]
        self.waiting.add(request)

    def leave(self, request: Request) -> None:
        """Take a request out of everything; results that are still due for it will be dropped."""
        if request.running:
            self._give_up_row(request)
        elif self.paused.pop(request.uid, None) is None:
            self.waiting.remove(request)
        self.kv.close(request.uid)
        self.trials.leave(request.uid)
        del self.live[request.uid], self.by_id[request.spec.id]

    def restart(self, request: Request) -> Request:
        """Begin again with the tokens it has under a new uid, so that results still in flight are dropped."""
        paused = request.uid in self.paused
        fresh = self.make(request.spec)
        self.trials.follow(request.uid, fresh.uid)
        self.leave(request)
        for name in _KEPT:
            setattr(fresh, name, getattr(request, name))
        fresh.num_preemptions = request.num_preemptions + 1
        self.enter(fresh)
        if paused:
            self.pause(fresh)
        return fresh

    def _stop_running(self, request: Request) -> None:
        self._give_up_row(request)
        self.kv.release(request.uid)
        request.computed = request.scheduled = request.room = 0
        request.blocked_at = -1

    def _give_up_row(self, request: Request) -> None:
        request.left_blocks = self.wrote(request) if request.in_flight else []
        del self.running[bisect_left(self.running, request.claim, key=by_claim)]
        self.rows_to_free.append(request.row)
        self.released.append(request.spec.id)
        self.free_rows.append(request.row)
        self.sharing.leave(request.row)
        request.row = NO_ROW

    def wrote(self, request: Request) -> list[tuple[int, int]]:
        """The (group, block) that it has put K/V into itself, or has given up while a step in flight did."""
        if not request.running:
            return request.left_blocks
        borrowed = set(self.kv.leading(request.uid, request.borrowed // self.kv.block_size))
        return [at for at in self.kv.held_blocks(request.uid) if at not in borrowed]

    def problems(self) -> list[str]:
        """What is wrong: nothing, unless an invariant is broken. Raises RuntimeError when blocks are lost."""
        self.kv.check()
        found = []
        waiting = list(self.waiting.in_order())
        if sorted([r.row for r in self.running] + self.free_rows) != list(range(self.limits.max_num_seqs)):
            found.append("rows are lost or double")
        if sorted(r.uid for r in (*self.running, *waiting, *self.paused.values())) != sorted(self.live):
            found.append("a request is in no queue or in two")
        if [r.claim for r in self.running] != sorted(r.claim for r in self.running):
            found.append("running requests are out of order")
        for r in self.live.values():
            held = self.kv.held_blocks(r.uid)
            if r.running and (len(held) < self.kv.blocks_for(r.scheduled) or len(held) * self.kv.block_size < r.room):
                found.append(f"request {r.uid} runs beyond its blocks")
            if not r.running and held:
                found.append(f"request {r.uid} waits or is paused but holds blocks")
            if not r.computed <= r.scheduled <= len(r.token_ids) + r.pending:
                found.append(f"request {r.uid}: computed {r.computed}, scheduled {r.scheduled} are out of step")
        return found + self._sharing_problems()

    def _sharing_problems(self) -> list[str]:
        """What is wrong in what plans say of shared blocks: they must be the same ones, and computed or planned by now."""
        found = []
        shared = self.sharing.current()
        on_row = {r.row: r for r in self.running}
        if len({row for s in shared for row in s.rows}) != sum(len(s.rows) for s in shared):
            found.append("a row shares its beginning twice")
        for s in shared:
            if list(s.rows) != sorted(s.rows) or not on_row.keys() >= set(s.rows):
                found.append(f"rows {s.rows} share blocks but are out of order or not running")
                continue
            members = [on_row[row] for row in s.rows]
            runs = {self.kv.leading_blocks(r.uid, s.num_blocks) for r in members}
            if len(runs) != 1 or {len(run) for run in runs} != {s.num_blocks}:
                found.append(f"rows {s.rows} do not begin with the same {s.num_blocks} blocks")
            if any(r.scheduled < s.num_blocks * self.kv.block_size for r in members):
                found.append(f"rows {s.rows} share blocks that nobody computed")
        return found
