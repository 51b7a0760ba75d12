"""Counting a reply's tokens over its choices, and what a stream tells of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec import UNSET, UnsetType

from minivllm.errors import InvalidRequest, RequestError
from minivllm.server.logprobs import LogprobTexts, OfPrompt
from minivllm.server.protocol import OpenAIFields
from minivllm.server.replies import PromptTokensDetails, TokenIds, Usage, error_body
from minivllm.server.sse import DONE, json_event
from minivllm.types import RequestOutput, TokenLogprobs


@dataclass
class Counts:
    """Written by the route that writes the choices."""

    num_samples: int  # neighbouring choices that are of one prompt
    details: bool  # whether the usage says what was found in the cache
    newest: dict[int, RequestOutput] = field(default_factory=dict)  # of each choice

    def see(self, index: int, output: RequestOutput) -> None:
        """Take the counts of a choice's newest output."""
        self.newest[index] = output

    def usage(self) -> Usage:
        """The sum so far; a prompt counts once, however many texts are made of it."""
        first = {index // self.num_samples: o for index, o in sorted(self.newest.items(), reverse=True)}  # of each prompt
        prompt = sum(o.num_prompt for o in first.values())
        output = sum(o.num_output for o in self.newest.values())
        if self.details:
            details = PromptTokensDetails(sum(o.num_cached for o in first.values()))
            return Usage(prompt, prompt + output, output, details)
        return Usage(prompt, prompt + output, output)


@dataclass(frozen=True)
class Asked:
    """What a request asks to be told beside texts. Written by its route, which writes the logprobs."""

    prompts: Sequence[Sequence[int]] | None  # ids of each choice's prompt, for ``return_token_ids``; None: not asked for
    logprobs: LogprobTexts
    num_top: int | None = None  # likeliest tokens to tell in ``prompt_logprobs``; None: not asked for

    def prompt(self, index: int) -> TokenIds:
        """Token ids of a choice's prompt, if they are asked for."""
        return UNSET if self.prompts is None else tuple(self.prompts[index])

    def of_prompt(self, ids: Sequence[int], found: Sequence[TokenLogprobs]) -> OfPrompt | UnsetType:
        """Logprobs of a prompt, if they are asked for."""
        return UNSET if self.num_top is None else self.logprobs.of_prompt(ids, found, self.num_top)

    def new(self, output: RequestOutput) -> TokenIds:
        """Token ids of a new output, if they are asked for."""
        return UNSET if self.prompts is None else output.token_ids


@dataclass(frozen=True)
class StreamUsage:
    """Whether a stream tells its usage at the end, and with each chunk."""

    last: bool
    each: bool


def stream_usage(body: OpenAIFields) -> StreamUsage:
    """What ``stream_options`` asks for. Raises ``InvalidRequest`` where nothing streams, and for what no stream tells."""
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs are told in whole replies only; leave out stream.", "prompt_logprobs")
    options = body.stream_options
    if options is None:
        return StreamUsage(last=False, each=False)
    if not body.stream:
        raise InvalidRequest("stream_options is only for streams; set stream to true or leave it out.", "stream_options")
    last = bool(options.include_usage)
    return StreamUsage(last=last, each=last and bool(options.continuous_usage_stats))


def stream_failure(error: RequestError) -> bytes:
    """The end of an OpenAI-compatible stream that broke: the error, then the mark; no finish reason came before."""
    return json_event(error_body(error)) + DONE
