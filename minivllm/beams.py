"""Beam search: of all ways that a text may go on, keep the ``beam_width`` likeliest after every token.

A search is a face above the engine, which knows nothing of it: each beam is asked for one more token as a request of its own,
whose prompt is the beam and whose logprobs say how it could go on. What beams have in common is found in the prefix cache, so
that blocks are shared, and a step computes no more of a beam than the block that it has begun.

Whether a beam is better than another is decided as vLLM does: the sum of its logprobs over its length to the power of
``length_penalty``, where the prompt counts in the length and the end of the text does not. ``BeamSearch`` holds one search and
makes no request itself, so the server and ``LLM`` search alike.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from minivllm.errors import ContextTooLong, InvalidRequest
from minivllm.text.outputs import OutputProcessor
from minivllm.text.tokenizer import Tokenizer
from minivllm.types import MAX_LOGPROBS, FinishReason, RequestOutput, SamplingParams, TokenEvent, TokenLogprobs

MAX_BEAMS = MAX_LOGPROBS // 2  # each beam tells twice as many ways to go on: all but one of the best may end their text
MAX_PENALTY = 10.0  # lengths to a higher power are no numbers any more


class BeamSearchParams(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What a search looks for. Raises ``InvalidRequest`` with the field in ``param``, as the routes call it."""

    beam_width: int  # beams that are kept, and texts that are told
    max_tokens: int
    length_penalty: float = 1.0  # over 0 it favours long texts: sums of logprobs are negative
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False  # the token that ends a text is part of it
    skip_special_tokens: bool = True
    logprobs: int | None = None  # likeliest tokens to tell of each position beside the text's own; None: no logprobs

    def __post_init__(self) -> None:
        """Check every range."""
        if not 1 <= self.beam_width <= MAX_BEAMS:
            raise InvalidRequest(f"A beam search keeps from 1 to {MAX_BEAMS} beams, got n = {self.beam_width}.", "n")
        if self.max_tokens < 1:
            raise InvalidRequest(f"max_tokens must be at least 1, got {self.max_tokens}.", "max_tokens")
        if not (math.isfinite(self.length_penalty) and abs(self.length_penalty) <= MAX_PENALTY):
            raise InvalidRequest(f"length_penalty must be from -{MAX_PENALTY:g} to {MAX_PENALTY:g}.", "length_penalty")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise InvalidRequest(f"logprobs must be from 0 to {MAX_LOGPROBS}, got {self.logprobs}.", "logprobs")

    @property
    def num_ways(self) -> int:
        """In how many ways each beam may go on."""
        return 2 * self.beam_width

    @property
    def step(self) -> SamplingParams:
        """How a beam is asked for one more token. Which token is drawn does not matter."""
        asked = max(self.num_ways, self.logprobs or 0)
        return SamplingParams(temperature=0.0, max_tokens=1, logprobs=asked, ignore_eos=True, seed=0)

    def check(self, num_prompt: int, max_model_len: int, max_logprobs: int) -> None:
        """Raise ``InvalidRequest`` for a search that could not be carried through. ``max_logprobs``: that can be told."""
        if num_prompt + self.max_tokens > max_model_len:
            raise ContextTooLong(max_model_len, num_prompt, self.max_tokens)
        if self.num_ways > max_logprobs:
            raise InvalidRequest(
                f"A search with {self.beam_width} beams looks at {self.num_ways} logprobs a token, but this server tells "
                f"{max_logprobs} (--max-logprobs); ask for fewer beams.",
                "n",
            )


class Beam(NamedTuple):
    """A text so far."""

    token_ids: tuple[int, ...] = ()  # behind the prompt
    total: float = 0.0  # sum of their logprobs
    found: tuple[TokenLogprobs, ...] = ()  # of each of them
    ended: bool = False  # by its last token


class BeamSearch:
    """One search. Written by whoever asks the engine: ``take`` what it says of each of ``asks``, until there are none."""

    def __init__(self, prompt_ids: Sequence[int], params: BeamSearchParams, eos_token_ids: Sequence[int]) -> None:
        self.prompt_ids = tuple(prompt_ids)
        self.params = params
        self._eos = frozenset(() if params.ignore_eos else eos_token_ids)
        self._open = [Beam()]
        self._ended: list[Beam] = []  # the best of those that ended, best first

    @property
    def asks(self) -> list[tuple[int, ...]]:
        """The tokens of each beam that is to go on; none: the search is over."""
        return [self.prompt_ids + beam.token_ids for beam in self._open] if self._goes_on() else []

    def take(self, found: Sequence[TokenLogprobs]) -> None:
        """What may follow each of ``asks``: they are one token longer after this."""
        width, ended = self.params.beam_width, self._ended
        ways: list[tuple[Beam, int, float, TokenLogprobs]] = []
        for beam, every in zip(self._open, found, strict=True):
            for token, value in zip(every.top_ids[: self.params.num_ways], every.top_logprobs, strict=False):
                if token in self._eos:
                    ended.append(self._longer(beam, token, value, every))
                else:
                    ways.append((beam, token, value, every))
        ways.sort(key=lambda way: way[0].total + way[2], reverse=True)  # all are of one length; equals stay in their order
        self._open = [self._longer(*way) for way in ways[:width]]
        self._ended = sorted(ended, key=self.score, reverse=True)[:width]

    def best(self) -> list[Beam]:
        """The ``beam_width`` best texts, best first."""
        return sorted([*self._ended, *self._open], key=self.score, reverse=True)[: self.params.beam_width]

    def score(self, beam: Beam) -> float:
        """How good a text is; higher is better."""
        return self._score(beam.total, len(beam.token_ids) - beam.ended)

    def outputs(self, request_id: str, tokenizer: Tokenizer, num_cached: int = 0) -> list[RequestOutput]:
        """The best texts as if each had been generated by a request of its own."""
        p = self.params
        shown = SamplingParams(
            include_stop_str_in_output=p.include_stop_str_in_output, skip_special_tokens=p.skip_special_tokens
        )
        room, events = OutputProcessor(tokenizer), []
        for i, beam in enumerate(self.best()):
            room.add(f"{request_id}-{i}", self.prompt_ids, shown)
            logprobs = () if p.logprobs is None else beam.found
            reason: FinishReason = "stop" if beam.ended else "length"
            events.append(TokenEvent(f"{request_id}-{i}", beam.token_ids, reason, None, num_cached, None, logprobs))
        return room.process(events)[0]

    def _goes_on(self) -> bool:
        """False when no open beam may grow, or none could become better than the texts that ended."""
        if not self._open or len(self._open[0].token_ids) == self.params.max_tokens:
            return False
        if len(self._ended) < self.params.beam_width:
            return True
        total = self._open[0].total  # of the best; it only falls, and is divided by the lengths from now to the longest
        hope = max(self._score(total, length) for length in (len(self._open[0].token_ids), self.params.max_tokens))
        return hope >= self.score(self._ended[-1])

    def _score(self, total: float, num_tokens: int) -> float:
        return total / math.pow(len(self.prompt_ids) + num_tokens, self.params.length_penalty)

    def _longer(self, beam: Beam, token: int, value: float, every: TokenLogprobs) -> Beam:
        shown = self.params.logprobs or 0
        rank = 1 + sum(other > value for other in every.top_logprobs)
        found = TokenLogprobs(value, rank, every.top_ids[:shown], every.top_logprobs[:shown])
        return Beam((*beam.token_ids, token), beam.total + value, (*beam.found, found), token in self._eos)
