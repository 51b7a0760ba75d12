"""What clients may send: one msgspec Struct a route, holding exactly the fields that are served.

Structs check types only (strictly: "1" is not a number). Ranges are checked by ``types.SamplingParams``, which every face
builds, and ``fields.py`` says what becomes of fields that are not served. null means "not given", as clients of this
protocol send it. Defaults: a field of the request beats the model's generation_config.json, which beats the route's default;
/v1 samples at temperature 1 as its clients expect, /generate is greedy and looks at no such file.
"""

from typing import Any, Literal

import msgspec

from minivllm.errors import InvalidRequest, MalformedBody
from minivllm.server.fields import HARMLESS, NATIVE_NOT_SERVED, NOT_SERVED, Form
from minivllm.server.structured import ResponseFormat, StructuredOutputs
from minivllm.server.tools import Choice
from minivllm.types import MAX_SAMPLES, SETTLED, RepetitionDetection, SamplingParams

MAX_STOPS = 64  # each is searched for at every token
MAX_STOP_CHARS = 1024


class SamplingFields(msgspec.Struct, kw_only=True):
    """The fields of ``SamplingParams``, each of which a request may leave out."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    logit_bias: dict[str, float] | None = None  # token id -> what is added to its logit
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None


class GenerateBody(SamplingFields, kw_only=True):
    """Body of /generate."""

    prompt: str


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream tells besides text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class OpenAIFields(SamplingFields, kw_only=True):
    """What the two OpenAI-compatible routes have in common."""

    model: str | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = None
    cache_salt: str | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None  # of a longer prompt so many are kept; -1: as many as the context has room for
    truncation_side: Literal["left", "right"] | None = None  # where tokens are cut off; none: left
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    repetition_detection: RepetitionDetection | None = None
    prompt_logprobs: int | None = None  # likeliest tokens to tell of each position of the prompt
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None  # in logprobs
    explain: bool | None = None  # the reply says where its time went; this server's own field


class CompletionBody(OpenAIFields, kw_only=True):
    """Body of /v1/completions. ``prompt``: a text, texts, token ids, or lists of token ids."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | bool | None = None  # likeliest tokens to tell of each position; false: none
    echo: bool | None = None  # texts begin with their prompt
    use_beam_search: bool | None = None
    length_penalty: float | None = None  # of a beam search
    best_of: int | None = None  # texts to generate of each prompt, of which the n likeliest are told


class ChatBody(OpenAIFields, kw_only=True):
    """Body of /v1/chat/completions. ``max_completion_tokens`` is the newer name of ``max_tokens`` and beats it."""

    messages: list[dict[str, Any]]
    logprobs: bool | None = None
    top_logprobs: int | None = None  # likeliest tokens to tell of each position
    max_completion_tokens: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None  # for the template
    reasoning_effort: str | None = None  # for the template
    chat_template_kwargs: dict[str, Any] | None = None  # whatever else the template reads


class TokenizeBody(msgspec.Struct, kw_only=True):
    """Body of /tokenize: ``prompt`` or ``messages``."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """Body of /detokenize."""

    tokens: list[int]
    model: str | None = None


GENERATE = Form("/generate", GenerateBody, NATIVE_NOT_SERVED)
COMPLETION = Form("/v1/completions", CompletionBody, NOT_SERVED, HARMLESS)
CHAT = Form("/v1/chat/completions", ChatBody, NOT_SERVED, HARMLESS)
TOKENIZE = Form("/tokenize", TokenizeBody, NOT_SERVED, HARMLESS)
DETOKENIZE = Form("/detokenize", DetokenizeBody, NOT_SERVED, HARMLESS)
FORMS: tuple[Form[Any], ...] = (GENERATE, COMPLETION, CHAT, TOKENIZE, DETOKENIZE)


def sampling_of(body: SamplingFields, **defaults: Any) -> SamplingParams:
    """The request's sampling; ``defaults`` stand where it gives none. Raises ``InvalidRequest``."""
    by_route = ("logprobs", "grammar")
    served = (f for f in SamplingParams.__struct_fields__ if f not in SETTLED and f not in by_route)
    given = {f: value for f in served if (value := getattr(body, f, None)) is not None}
    stop = given.get("stop", ())
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS or any(len(s) > MAX_STOP_CHARS for s in stops):
        raise InvalidRequest(f"stop takes at most {MAX_STOPS} strings of at most {MAX_STOP_CHARS} characters.", "stop")
    given["stop"] = stops
    for name in ("stop_token_ids", "allowed_token_ids", "bad_words"):
        if name in given:
            given[name] = tuple(given[name])
    try:
        given["logit_bias"] = tuple((int(token), value) for token, value in given.get("logit_bias", {}).items())
    except ValueError:
        raise InvalidRequest("The keys of logit_bias must be token ids, as in {\"42\": -100}.", "logit_bias") from None
    return SamplingParams(**{**defaults, **given})


def logprobs_of(asked: int | bool | None) -> int | None:
    """The ``logprobs`` of a completion request as ``SamplingParams`` has it. Raises ``InvalidRequest``."""
    if asked is True:
        raise InvalidRequest("logprobs is a number on this route: how many of the likeliest tokens to tell.", "logprobs")
    return None if asked is False else asked


def with_best_of(sampling: SamplingParams, body: CompletionBody) -> SamplingParams:
    """``sampling`` for as many texts as ``best_of`` asks for, with what it takes to choose among them. Raises
    ``InvalidRequest``."""
    count, n = body.best_of, sampling.n
    if count is None or count == n:
        return sampling
    if not n <= count <= MAX_SAMPLES:
        raise InvalidRequest(f"best_of must be from n, which is {n}, to {MAX_SAMPLES}, got {count}.", "best_of")
    if body.stream:
        raise InvalidRequest("A stream cannot wait for the best texts; leave out best_of, or set it to n.", "best_of")
    if sampling.greedy:
        raise InvalidRequest("best_of has no choice at temperature 0: all texts would be the same one.", "best_of")
    return msgspec.structs.replace(sampling, n=count, logprobs=sampling.logprobs or 0)


def chat_logprobs_of(body: ChatBody) -> int | None:
    """The same of a chat request. Raises ``InvalidRequest``."""
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true.", "top_logprobs")
    return None


def truncated(ids: list[int], body: OpenAIFields, max_model_len: int) -> list[int]:
    """What ``truncate_prompt_tokens`` leaves of a prompt. Raises ``InvalidRequest``."""
    asked = body.truncate_prompt_tokens
    if asked is None:
        if body.truncation_side is not None:
            raise InvalidRequest("truncation_side has no effect without truncate_prompt_tokens; give both.", "truncation_side")
        return ids
    if asked != -1 and not 1 <= asked <= max_model_len:
        raise InvalidRequest(
            f"truncate_prompt_tokens must be -1 or from 1 to the context of {max_model_len} tokens, got {asked}.",
            "truncate_prompt_tokens",
        )
    kept = asked if asked != -1 else max(1, max_model_len - max(1, body.max_tokens or 1))
    return ids[:kept] if body.truncation_side == "right" else ids[-kept:]


def prompts_of(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """The prompts of a completion request, each a text or token ids. Raises ``InvalidRequest``, ``MalformedBody``."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequest("The prompt is empty; send a text or at least one token id.", "prompt")
    ids = [p for p in prompt if isinstance(p, int)]
    if len(ids) == len(prompt):
        return [ids]
    many = [p for p in prompt if not isinstance(p, int)]
    if ids or len({type(p) for p in many}) > 1:
        raise MalformedBody("prompt mixes texts, token ids and lists of them; send one kind.", "body.prompt")
    return many
