"""What a face itself notes of a request while it is on its way: stamps that no StepRecord has, and who asked."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


class Trail:
    """Stamps of one request at its face, on time.monotonic(). Written by whoever has the request in hand; in one thread."""

    def __init__(self, received_s: float, tenant: str = "", traceparent: str = "") -> None:
        self.received_s = received_s
        self.tenant = tenant
        self.traceparent = traceparent  # as the client sent it
        self.request_id = ""  # as the client will know it
        self.first_text_s: float | None = None  # when the first text was handed to the connection, if anything streams
        self.delivered_s: float | None = None  # when the last byte was
        self.on_delivered: Callable[[], None] | None = None
        self._phases: list[tuple[str, float, float]] = []
        self._begun: tuple[str, float] | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase begins and ends with this block, also when it fails."""
        began_s = time.monotonic()
        try:
            yield
        finally:
            self._phases.append((name, began_s, time.monotonic()))

    def received(self, now_s: float | None = None) -> None:
        """The whole request is there."""
        self._phases.append(("received", self.received_s, time.monotonic() if now_s is None else now_s))

    def begin(self, name: str) -> None:
        """A phase begins that will end elsewhere."""
        self._begun = (name, time.monotonic())

    def finish(self) -> None:
        """What has begun ends now."""
        if self._begun is not None:
            self._phases.append((*self._begun, time.monotonic()))
            self._begun = None

    @property
    def phases(self) -> Sequence[tuple[str, float, float]]:
        """Name, begin and end of each phase at the face, in their order."""
        return self._phases

    def delivered(self, now_s: float) -> None:
        """The answer is over, one way or another."""
        self.delivered_s = now_s
        if self.on_delivered is not None:
            self.on_delivered()
