"""Where requests come from and where their tokens go: the same desk for every rung, so that all are measured alike.

A rung takes requests that have arrived, and tells each token as soon as it has it. It knows nothing of clocks. When the rung's
time is over, the desk hands out no more requests (but for the first ones); when it is over twice, those that run are cut short.
"""

import time
from dataclasses import dataclass, field


@dataclass
class Request:
    """One text to continue. Written by the ``Desk``."""

    id: str
    prompt: tuple[int, ...]
    num_output: int  # tokens that are wanted; an end-of-text token ends nothing here
    arrival_s: float  # since the desk opened
    output: list[int] = field(default_factory=list)
    told_s: list[float] = field(default_factory=list)  # when each of them came, since the desk opened
    cut: bool = False  # fewer tokens than wanted: the time was over

    @property
    def done(self) -> bool:
        """No more tokens are wanted."""
        return self.cut or len(self.output) >= self.num_output

    @property
    def text(self) -> list[int]:
        """Prompt and output so far."""
        return [*self.prompt, *self.output]


class Desk:
    """Hands requests out in the order of their arrival, and collects their tokens. Written by the rung that runs."""

    def __init__(self, requests: list[Request], max_s: float) -> None:
        """``max_s``: seconds after which no request is handed out any more; after as many again, texts are cut short."""
        self._waiting = sorted(requests, key=lambda r: r.arrival_s)[::-1]  # the next one last
        self._max_s = max_s
        self.taken: list[Request] = []
        self._idle_s = 0.0
        self.opened_s = time.monotonic()

    @property
    def busy_s(self) -> float:
        """From the opening to the last token, without the time in which nobody was there to be served."""
        last_s = max((request.told_s[-1] for request in self.taken if request.told_s), default=0.0)
        return last_s - self._idle_s

    @property
    def open(self) -> bool:
        """There are requests to be taken, now or later."""
        return bool(self._waiting) and (not self.taken or self._now() < self._max_s)

    def take(self, most: int, *, wait: bool = True) -> list[Request]:
        """Up to ``most`` requests that have arrived. With ``wait`` it is none only when there will be no more."""
        if not self.open or most == 0:
            return []
        if wait:
            until_s = max(0.0, self._waiting[-1].arrival_s - self._now())
            time.sleep(until_s)
            self._idle_s += until_s
        found: list[Request] = []
        while self._waiting and len(found) < most and self._waiting[-1].arrival_s <= self._now():
            found.append(self._waiting.pop())
        self.taken += found
        return found

    def tell(self, request: Request, token: int) -> None:
        """A request's next token."""
        request.output.append(token)
        request.told_s.append(now := self._now())
        request.cut = now > 2 * self._max_s and len(request.output) < request.num_output

    def _now(self) -> float:
        return time.monotonic() - self.opened_s
