"""What the server must know of each request to have another engine go on with it: the request itself, and what came of it.

A text is a function of the prompt, the tokens so far and the seed (random numbers are keyed by seed and position), and a
grammar's state is one of the tokens so far. So a request and its tokens are all there is to keep; everything else that an
engine held is made again from them.

A request may be what kills engines. Nobody can tell from outside, so each death counts as a *strike* for every request that was
in the batch, and one that has got on since the last death (``TRIAL_TOKENS``) begins to count anew: it was not what killed that
engine. With a second strike a request is a suspect, and is tried alone; with a third it is ended.
"""

from array import array
from collections.abc import Iterator
from typing import Final

import msgspec

from minivllm.types import GenerateRequest, TokenEvent

TRIAL_TOKENS: Final = 4  # of a request in one engine's life, after which it is not suspected of that engine's end
_SUSPECT, _GUILTY = 2, 3  # strikes
_FAILED = "The engine ended three times with this request in its batch, the last time alone; it was not tried again."


class Entry:
    """One request that is not finished. Written by the ``Journal``."""

    __slots__ = ("cached", "fresh", "in_batch", "output", "paused", "prompt_told", "replayed", "request", "strikes")

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.output = array("i", request.prior_output_ids)  # every token that the engine told of
        self.prompt_told = request.prior_prompt_logprobs
        self.cached = 0
        self.replayed = False
        self.paused = False
        self.in_batch = self.prepares
        self.fresh = 0  # tokens since the engine that runs now began
        self.strikes = 0

    @property
    def prepares(self) -> bool:
        """True for one that the engine is at work for before any step: it makes its grammar."""
        return self.request.sampling.grammar is not None

    @property
    def suspect(self) -> bool:
        """True when it must be tried alone."""
        return self.strikes >= _SUSPECT

    def again(self) -> GenerateRequest:
        """The request for another engine, which goes on where the last one's words ended."""
        return msgspec.structs.replace(
            self.request, prior_output_ids=tuple(self.output), prior_prompt_logprobs=self.prompt_told
        )


class Journal:
    """Every request that is not finished, in the order of arrival. Written by the ``Supervisor``."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def add(self, request: GenerateRequest) -> Entry:
        """Take a request down."""
        entry = self._entries[request.id] = Entry(request)
        return entry

    def get(self, request_id: str) -> Entry | None:
        """The entry of a request, if it is not finished."""
        return self._entries.get(request_id)

    def drop(self, request_id: str) -> None:
        """Forget a request."""
        self._entries.pop(request_id, None)

    def take(self, event: TokenEvent) -> TokenEvent | None:
        """Take down what came of a request. The event as its reader is to see it; None: nobody knows the request any more."""
        entry = self._entries.get(event.id)
        if entry is None:
            return None
        entry.output.extend(event.token_ids)
        entry.fresh += len(event.token_ids)
        entry.prompt_told += len(event.prompt_logprobs)
        if entry.replayed and event.num_cached != entry.cached:
            event = msgspec.structs.replace(event, num_cached=entry.cached)  # of its first life: the one that the user saw
        entry.cached = event.num_cached
        if event.finish_reason is not None:
            del self._entries[event.id]
        return event

    def joined(self, ids: tuple[str, ...]) -> None:
        """These requests are in the engine's batch from now on."""
        for request_id in ids:
            if (entry := self._entries.get(request_id)) is not None:
                entry.in_batch = True

    def died(self) -> list[TokenEvent]:
        """The engine is dead: count strikes. The last events of requests that have had three."""
        failed = []
        for entry in list(self._entries.values()):
            if not entry.in_batch:
                entry.strikes = 0
            else:
                entry.strikes = 1 if entry.fresh >= TRIAL_TOKENS else entry.strikes + 1
            # A request that nothing came of has not been seen to be in the cache or not.
            entry.replayed = entry.replayed or bool(entry.output) or bool(entry.prompt_told)
            entry.in_batch, entry.fresh = entry.prepares, 0
            if entry.strikes >= _GUILTY:
                del self._entries[entry.request.id]
                failed.append(TokenEvent(entry.request.id, (), "error", error=_FAILED))
        return failed
