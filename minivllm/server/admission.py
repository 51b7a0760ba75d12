"""Who may come in: a bound on what the server has taken in and not finished, in requests and in tokens, and limits per tenant.

*Reserve first, then parse.* A refusal must cost next to nothing, or an overloaded server drowns in refusing. So a request is
counted before its body is read, with a guess of its tokens from Content-Length, and refused then if there is no room. Once it
is tokenized the guess is replaced by what it may cost: prompt tokens, n times max_tokens, and a price for each logprob. Each
text counts as a request, of n and of a list of prompts. What was counted is given back when the request ends, however it ends.

*When to come back.* Costs given back over the last seconds are the rate at which the server gets through its work, so the
excess divided by it is when there is room. Whoever is refused is also given a place behind those refused before: clients that
come back when they were told arrive at the rate at which work is done, and not all at once.

Plain numbers in one thread; time is passed in. It knows neither HTTP nor what a token means.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from minivllm.async_llm import Order
from minivllm.beams import BeamSearchParams
from minivllm.config import ServerConfig
from minivllm.errors import ServerOverloaded, TooManyRequests
from minivllm.types import EngineInfo

BYTES_PER_TOKEN: Final = 4  # of a JSON body, as a first guess
LOGPROB_TOKENS: Final = 0.25  # what telling one logprob counts, in tokens; chosen: its JSON takes some 5 us of the event loop
WINDOW_S: Final = 10.0  # over which the rate of work is measured
BIN_S: Final = 0.5
LONGEST_RETRY_S: Final = 60


@dataclass(frozen=True)
class Bounds:
    """The most that is taken in. None: no such limit."""

    requests: int  # unfinished ones, those that run included
    tokens: int
    requests_per_key: int | None = None
    tokens_per_minute_per_key: int | None = None


def bounds_of(config: ServerConfig, info: EngineInfo) -> Bounds:
    """What can run at once, and what the options let wait beside it."""
    return Bounds(
        info.max_num_seqs + config.max_num_queued_reqs,
        info.num_blocks * info.block_size + config.max_num_queued_tokens,
        config.max_requests_per_key,
        config.max_tokens_per_minute_per_key,
    )


@dataclass(frozen=True)
class Cost:
    """What a request may take."""

    requests: int
    tokens: int
    output: int = 0  # of the tokens, those that it may generate: what it does not is given back to its tenant


def cost_of(orders: Sequence[Order], max_model_len: int) -> Cost:
    """Of each prompt once, of each text as much as it may be, and a price for logprobs."""
    tokens, output = 0.0, 0
    for order in orders:
        sampling, num_prompt = order.sampling, len(order.prompt_ids)
        most = sampling.max_tokens if sampling.max_tokens is not None else max(max_model_len - num_prompt, 1)
        output += most
        tokens += most + (num_prompt if order.fork_of is None else 0)
        for count, told in ((sampling.logprobs, most), (sampling.prompt_logprobs, num_prompt)):
            if count is not None:
                tokens += told * (1 + count) * LOGPROB_TOKENS
    return Cost(len(orders), math.ceil(tokens), output)


def cost_of_beams(searches: Sequence[tuple[Order, BeamSearchParams]]) -> Cost:
    """Every beam is a request, and at every token it is told as many logprobs as there may be beams to go on with."""
    tokens = 0.0
    for order, params in searches:
        told = 1 + (1 + 2 * params.beam_width) * LOGPROB_TOKENS
        tokens += len(order.prompt_ids) + params.beam_width * params.max_tokens * told
    return Cost(sum(params.beam_width for _, params in searches), math.ceil(tokens))


@dataclass
class Ticket:
    """What one HTTP request has reserved. Written by ``Admission``, but for ``num_output``: by whoever counts its tokens."""

    tenant: str
    cost: Cost
    settled: bool = False
    num_output: int | None = None  # tokens generated in the end; None: nobody counted


@dataclass
class _Tenant:
    """Written by ``Admission``."""

    requests: int
    tokens_left: float  # in the bucket; below zero it is in debt
    filled_s: float  # when that was so


@dataclass
class _Rate:
    """What was finished over the last seconds. Written by ``Admission``."""

    last_s: float  # when something was, or counting began
    bins: deque[list[float]] = field(default_factory=deque)  # [bin number, requests, tokens]

    def add(self, cost: Cost, now: float) -> None:
        """So much is finished."""
        number = now // BIN_S
        if not self.bins or self.bins[-1][0] != number:
            self.bins.append([number, 0.0, 0.0])
        self.bins[-1][1] += cost.requests
        self.bins[-1][2] += cost.tokens
        self.last_s = now

    def per_s(self, now: float) -> tuple[float, float]:
        """Requests and tokens a second."""
        while self.bins and self.bins[0][0] < (now - WINDOW_S) // BIN_S:
            self.bins.popleft()
        if not self.bins:
            return 0.0, 0.0
        span_s = max(now - self.bins[0][0] * BIN_S, BIN_S)
        return sum(b[1] for b in self.bins) / span_s, sum(b[2] for b in self.bins) / span_s


class Admission:
    """Counts of what was taken in. Written by the server's event loop alone."""

    def __init__(self, bounds: Bounds, now: float, on_refusal: Callable[[str], None]) -> None:
        """``on_refusal`` is told the reason of each refusal."""
        self.bounds = bounds
        self.requests = 0
        self.tokens = 0
        self._on_refusal = on_refusal
        self._tenants: dict[str, _Tenant] = {}  # their names come from the file of keys, so there are only so many
        self._rate = _Rate(now)
        self._last_place_s = now  # when the last of those that were refused may come back

    @property
    def full(self) -> bool:
        """True while the next request would be refused."""
        return self.requests >= self.bounds.requests or self.tokens >= self.bounds.tokens

    def reserve(self, tenant: str, guess: int, now: float) -> Ticket:
        """Count a request in whose body is not read yet. Raises ``ServerOverloaded`` or ``TooManyRequests``."""
        known = self._tenant(tenant, now)
        per_minute = self.bounds.tokens_per_minute_per_key
        if per_minute is not None and known.tokens_left <= 0:  # one request may bring it below; on average the limit is kept
            self._on_refusal("key_tokens")
            wait_s = _whole((1 - known.tokens_left) * 60 / per_minute)
            raise TooManyRequests(f"This key may use {per_minute} tokens a minute, and has used more", wait_s)
        self._check_room(known, 1, guess, now)
        ticket = Ticket(tenant, Cost(1, guess))
        self._count(known, 1, guess)
        return ticket

    def settle(self, ticket: Ticket, cost: Cost, now: float) -> None:
        """Put what the request may cost in the place of the guess, and charge it to the tenant. Raises as ``reserve`` does."""
        known = self._tenant(ticket.tenant, now)
        requests, tokens = cost.requests - ticket.cost.requests, cost.tokens - ticket.cost.tokens
        self._check_room(known, requests, tokens, now, alone=self.requests == ticket.cost.requests)
        self._count(known, requests, tokens)
        ticket.cost, ticket.settled = cost, True
        known.tokens_left -= cost.tokens

    def release(self, ticket: Ticket, now: float) -> None:
        """The request has ended, one way or another."""
        known, cost = self._tenant(ticket.tenant, now), ticket.cost
        self._count(known, -cost.requests, -cost.tokens)
        if ticket.settled:
            self._rate.add(cost, now)
            known.tokens_left += 0 if ticket.num_output is None else max(cost.output - ticket.num_output, 0)
        ticket.cost, ticket.settled = Cost(0, 0), False

    def _count(self, known: _Tenant, requests: int, tokens: int) -> None:
        self.requests += requests
        self.tokens += tokens
        known.requests += requests

    def _check_room(self, known: _Tenant, requests: int, tokens: int, now: float, alone: bool = False) -> None:
        """Raise if this much more is too much. What is larger than the whole queue is taken when nothing else is there: it
        never would be otherwise."""
        bounds = self.bounds
        most = bounds.requests_per_key
        if most is not None and requests > 0 and known.requests + requests > most:
            self._on_refusal("key_requests")
            over = (known.requests + requests - most) * max(self.requests, 1) / max(known.requests, 1)  # its share of the work
            raise TooManyRequests(f"This key may have {most} requests open at once", self._retry_after_s(over, 0, now))
        if alone or not self.requests:
            return
        over_requests, over_tokens = self.requests + requests - bounds.requests, self.tokens + tokens - bounds.tokens
        too_many, too_long = requests > 0 and over_requests > 0, tokens > 0 and over_tokens > 0
        if too_many or too_long:
            self._on_refusal("queue_requests" if too_many else "queue_tokens")
            raise ServerOverloaded(self._retry_after_s(max(over_requests, 0), max(over_tokens, 0), now))

    def _retry_after_s(self, requests: float, tokens: float, now: float) -> int:
        """When so much will be finished, behind those that were refused before."""
        requests_per_s, tokens_per_s = self._rate.per_s(now)
        if not (requests_per_s and tokens_per_s):  # nothing was finished lately: wait as long again
            return _whole(now - self._rate.last_s)
        place_s = max(self._last_place_s, now) + 1 / requests_per_s
        self._last_place_s = min(place_s, now + LONGEST_RETRY_S)
        return _whole(max(requests / requests_per_s, tokens / tokens_per_s, self._last_place_s - now))

    def _tenant(self, name: str, now: float) -> _Tenant:
        """A tenant, with its bucket filled up to now."""
        per_minute = self.bounds.tokens_per_minute_per_key or 0
        known = self._tenants.get(name)
        if known is None:
            known = self._tenants[name] = _Tenant(0, per_minute, now)
        known.tokens_left = min(per_minute, known.tokens_left + (now - known.filled_s) * per_minute / 60)
        known.filled_s = now
        return known


def _whole(wait_s: float) -> int:
    """A Retry-After."""
    return max(1, min(math.ceil(wait_s), LONGEST_RETRY_S))
