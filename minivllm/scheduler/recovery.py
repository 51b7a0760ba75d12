"""What becomes of requests when something fails: a step, a row of it, or what is done for one request alone.

What fails at one request ends that request, and what it had a hand in is taken back; the others start over with the tokens they
have, and so get the text that they would have got. Where nobody knows at whom a step failed, ``trials.py`` finds out.
"""

from collections.abc import Sequence

from minivllm.records import PreemptionReason
from minivllm.scheduler.book import Book
from minivllm.scheduler.draft import Flight
from minivllm.scheduler.ledger import Ledger
from minivllm.scheduler.request import Request
from minivllm.scheduler.room import StepRoom
from minivllm.types import TokenEvent

MAX_FAILURES = 2  # failed steps in a row after which a request that is alone in one is ended with an error
FAULT = "The engine failed at this request, and ended it; its log says why."
_NOT_FINITE = "The model gave numbers that are not finite for this request; it was ended."
_NO_MEMORY = "The device has too little memory for this request, even alone; shorten the prompt or ask for fewer logprobs."


class Recovery:
    """Ends requests and lets them start over. Written by ``Scheduler``; moves requests in the book it was given."""

    def __init__(self, book: Book, ledger: Ledger, room: StepRoom) -> None:
        self._book, self._ledger, self._room = book, ledger, room
        self.unexplained = 0  # failures in a row that are no request's
        self.zeroed: list[tuple[int, int]] = []  # (group, block) that the next step is to overwrite with zeros

    def went_well(self, request: Request) -> None:
        """A step with work for it was good, after some that were not."""
        trials = self._book.trials
        if target := trials.target(request.uid):
            if request.computed < target:
                return
            trials.leave(request.uid)
            if request.running and trials.group:
                self._give_up_place(request)  # until the trials of the others are over
        request.failures = 0

    def end(self, request: Request, now: float, message: str = FAULT) -> TokenEvent:
        """End a request with an error, if it has not ended."""
        if self._book.is_live(request):
            self._ledger.end(request, "error", now)
            self._book.leave(request)
        return TokenEvent(request.spec.id, (), "error", error=message)

    def _restart(self, request: Request, reason: PreemptionReason) -> Request:
        self._ledger.preempt(request, reason)
        return self._book.restart(request)

    def _give_up_place(self, request: Request) -> None:
        self._ledger.preempt(request, "trial")
        self._book.preempt(request)

    def rows_failed(self, bad: Sequence[Request], now: float) -> list[TokenEvent]:
        """The logits of these were not finite. Whoever holds a block that one of them wrote may have read it, and have spoiled
        what it wrote itself: all of these start over, and nothing that any of them wrote is found or read again.

        A bad row that has computed everything itself ends. One that began with K/V of others may be their victim: it starts
        over once, and finds nothing of what it held.
        """
        live, kv = self._book.live, self._book.kv
        suspects = {r.uid: r for r in bad}
        wrote: dict[int, set[tuple[int, int]]] = {}
        todo = list(suspects.values())
        while todo:
            request = todo.pop()
            if request.uid not in wrote:
                blocks = wrote[request.uid] = set(self._book.wrote(request))
                todo += [live[uid] for uid in kv.holders(blocks)]
        spoiled = set[tuple[int, int]]().union(*wrote.values())
        held = {uid: set(kv.held_blocks(uid)) for uid in wrote if uid in live}
        events = []
        for uid, blocks in held.items():
            request, innocent = live[uid], uid not in suspects
            if not innocent:
                spoiled |= blocks
                innocent = any(blocks & wrote[other] for other in suspects if other != uid)
                innocent = innocent or (request.borrowed > 0 and not request.forgiven)
                request.forgiven = True
            if innocent:
                request.before = None
                self._restart(request, "not finite").before = request
            else:
                events.append(self.end(request, now, _NOT_FINITE))
        kv.unpublish(spoiled)
        self.zeroed += sorted(kv.unheld(spoiled))
        return events

    def step_failed(
        self, flights: Sequence[Flight], now: float, culprit: int | None = None, *, out_of_memory: bool = False
    ) -> list[TokenEvent]:
        """See ``Scheduler.fail``. ``flights`` are all that there were, and are void."""
        book, events = self._book, []
        for flight in flights:
            book.kv.unpublish(block for _, block in flight.published)
            self.zeroed += flight.plan.zeroed
            for entry in flight.entries:
                entry.request.in_flight = 0  # also of those that are no more, whose successors may wait for it
        found = {e.request.uid: e.request for f in flights for e in f.entries if book.is_live(e.request)}
        guilty = book.live.get(-1 if culprit is None else culprit)
        if guilty is not None:
            found.pop(guilty.uid, None)
            events.append(self.end(guilty, now))
        if guilty is not None or (out_of_memory and self._room.shrink()):
            for request in found.values():
                self._restart(request, "failed step")
            return events
        return self._suspect(tuple(found.values()), now, out_of_memory)

    def _suspect(self, requests: Sequence[Request], now: float, out_of_memory: bool) -> list[TokenEvent]:
        """One of these has broken a step."""
        book = self._book
        self.unexplained = 0 if requests else self.unexplained + 1
        if self.unexplained > MAX_FAILURES:
            raise RuntimeError("steps fail, and that has to do with none of the requests")
        for request in requests:
            request.failures += 1
        if len(requests) == 1 and requests[0].failures >= MAX_FAILURES:
            if out_of_memory:
                self._room.restore()
            return [self.end(requests[0], now, _NO_MEMORY if out_of_memory else FAULT)]
        targets: dict[int, int] = {}
        for request in requests:
            target = max(request.scheduled, book.trials.target(request.uid))
            book.trials.leave(request.uid)
            fresh = self._restart(request, "failed step")
            if fresh.uid not in book.paused:  # trials would wait for it; if it is the one, it is found when it goes on
                targets[fresh.uid] = target
        book.trials.suspect(targets)
        for request in list(book.running):
            self._give_up_place(request)  # whoever is on trial finds blocks
        return []
