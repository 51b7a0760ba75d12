"""What the OpenAI-compatible routes answer, as msgspec Structs, and the one place that makes error bodies.

``omit_defaults`` leaves out what is unset, as clients of this protocol expect of streamed chunks; fields without a default
are always there, null included. Nothing here knows how a reply came to be.
"""

import re
import uuid
from http import HTTPStatus
from typing import Literal

import msgspec
from starlette.responses import Response

from minivllm.errors import RequestError
from minivllm.observe.explanation import Explanation
from minivllm.server.logprobs import ChatLogprobs, CompletionLogprobs, OfPrompt
from minivllm.types import FinishReason

MAX_MESSAGE_CHARS = 600  # an error body stays under 4 KiB even if every character is written as \\u0000
MAX_PARAM_CHARS = 64
# What no message says, whoever wrote it (a template's exception, a library): where things are in memory and on disk.
_INSIDE = re.compile(
    r" at 0x[0-9A-Fa-f]*|Traceback \(.*|(/[\w.\-]+)+\.(py|so|rs|jinja)\b[:\d]*", re.DOTALL
)
encode = msgspec.json.Encoder().encode


TokenIds = tuple[int, ...] | msgspec.UnsetType  # left out where return_token_ids does not ask for them


class PromptTokensDetails(msgspec.Struct, frozen=True, gc=False):
    """What is known of the prompts' tokens."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens of a request: those of the prompts, those generated, and both."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptTokensDetails | msgspec.UnsetType = msgspec.UNSET


class CompletionChoice(msgspec.Struct, frozen=True, gc=False):
    """One text, whole or (in a stream) its next piece."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    token_ids: TokenIds = msgspec.UNSET
    prompt_token_ids: TokenIds = msgspec.UNSET
    prompt_logprobs: OfPrompt | msgspec.UnsetType = msgspec.UNSET


class Completion(
    msgspec.Struct, frozen=True, gc=False, kw_only=True, omit_defaults=True, tag_field="object", tag="text_completion"
):
    """Reply of /v1/completions; a stream's chunks have the same shape."""

    id: str
    created: int
    model: str
    choices: tuple[CompletionChoice, ...]
    usage: Usage | None = None
    explain: Explanation | None = None


class CalledFunction(msgspec.Struct, frozen=True, gc=False):
    """Which function is to be called, and with what, as JSON text."""

    name: str
    arguments: str


class MessageCall(msgspec.Struct, frozen=True, gc=False, tag_field="type", tag="function"):
    """A call of a tool."""

    id: str
    function: CalledFunction


class ChatMessage(msgspec.Struct, frozen=True, gc=False):
    """The assistant's whole answer; what this server does not make is null or empty."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: tuple[MessageCall, ...] = ()
    reasoning: str | None = None
    reasoning_content: str | None = None  # the same by its older name


ChatFinish = FinishReason | Literal["tool_calls"]


class ChatChoice(msgspec.Struct, frozen=True, gc=False):
    """One answer."""

    index: int
    message: ChatMessage
    finish_reason: ChatFinish | None
    stop_reason: int | str | None
    logprobs: ChatLogprobs | None = None
    token_ids: TokenIds = msgspec.UNSET


class ChatCompletion(msgspec.Struct, frozen=True, gc=False, kw_only=True, tag_field="object", tag="chat.completion"):
    """Reply of /v1/chat/completions."""

    id: str
    created: int
    model: str
    choices: tuple[ChatChoice, ...]
    usage: Usage
    prompt_token_ids: TokenIds = msgspec.UNSET
    prompt_logprobs: OfPrompt | msgspec.UnsetType = msgspec.UNSET
    explain: Explanation | msgspec.UnsetType = msgspec.UNSET


class DeltaFunction(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """The next piece of a call: at first its function's name, then more of its arguments."""

    name: str | None = None
    arguments: str | None = None


class DeltaCall(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """The next piece of one of an answer's calls; only its first has an id."""

    index: int
    function: DeltaFunction
    id: str | None = None
    type: Literal["function"] | None = None


class Delta(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """The next piece of an answer."""

    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None  # the same by its older name
    tool_calls: tuple[DeltaCall, ...] = ()


class ChunkChoice(msgspec.Struct, frozen=True, gc=False):
    """The next piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: None = None
    token_ids: TokenIds = msgspec.UNSET


class LastChunkChoice(msgspec.Struct, frozen=True, gc=False):
    """The end of one answer."""

    index: int
    delta: Delta
    finish_reason: ChatFinish
    stop_reason: int | str | None
    logprobs: ChatLogprobs | None = None
    token_ids: TokenIds = msgspec.UNSET


class ChatChunk(
    msgspec.Struct, frozen=True, gc=False, kw_only=True, omit_defaults=True, tag_field="object", tag="chat.completion.chunk"
):
    """One event of a streamed chat completion."""

    id: str
    created: int
    model: str
    choices: tuple[ChunkChoice | LastChunkChoice, ...]
    usage: Usage | None = None
    prompt_token_ids: TokenIds = msgspec.UNSET
    explain: Explanation | None = None


class ModelPermission(msgspec.Struct, frozen=True, gc=False):
    """What clients may do with a model; the same for everybody, here for clients that look."""

    id: str
    created: int
    object: str = "model_permission"
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = False
    allow_search_indices: bool = False
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    group: None = None
    is_blocking: bool = False


class ModelCard(msgspec.Struct, frozen=True, gc=False):
    """One name under which the model is served."""

    id: str
    created: int
    root: str
    max_model_len: int
    permission: tuple[ModelPermission, ...]
    object: str = "model"
    owned_by: str = "mini-vllm"
    parent: None = None


class ModelList(msgspec.Struct, frozen=True, gc=False):
    """Reply of /v1/models."""

    data: tuple[ModelCard, ...]
    object: str = "list"


class Tokens(msgspec.Struct, frozen=True, gc=False):
    """Reply of /tokenize."""

    count: int
    max_model_len: int
    tokens: tuple[int, ...]
    token_strs: tuple[str, ...] | None


class ErrorDetail(msgspec.Struct, frozen=True, gc=False):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorReply(msgspec.Struct, frozen=True, gc=False):
    """Body of every answer that is not a success."""

    error: ErrorDetail


class Head(msgspec.Struct, frozen=True, gc=False):
    """What every chunk of one reply repeats."""

    id: str
    created: int  # unix time
    model: str


def new_id(prefix: str) -> str:
    """A request id that nobody can guess or choose: the prefix and 128 random bits in hex."""
    return f"{prefix}-{uuid.uuid4().hex}"


def json_response(value: msgspec.Struct | dict[str, object], status: int = 200) -> Response:
    """``value`` as JSON."""
    return Response(encode(value), status, media_type="application/json")


def error_body(error: RequestError) -> bytes:
    """The JSON object that tells a client of ``error``; at most 4 KiB, and nothing of the inside."""
    message = _INSIDE.sub("", _shown(error.message, 2 * MAX_MESSAGE_CHARS))
    param = None if error.param is None else _shown(error.param, MAX_PARAM_CHARS)
    return encode(ErrorReply(ErrorDetail(_shown(message, MAX_MESSAGE_CHARS), error.kind, param, error.status)))


def _shown(text: str, most: int) -> str:
    """The beginning of ``text``, which may hold halves of characters."""
    cut = text if len(text) <= most else text[:most] + "..."
    return cut.encode("utf-8", "replace").decode()


def retry_after(error: RequestError) -> int | None:
    """Seconds after which the client may try again; None where that would not help."""
    return getattr(error, "retry_after_s", 1 if error.status == HTTPStatus.SERVICE_UNAVAILABLE else None)


def error_response(error: RequestError, close: bool = False) -> Response:
    """The HTTP answer for ``error``; with ``close`` the connection ends with it."""
    headers: dict[str, str] = {}
    if (retry_after_s := retry_after(error)) is not None:
        headers["retry-after"] = str(retry_after_s)
    if close or error.status == HTTPStatus.REQUEST_TIMEOUT:
        headers["connection"] = "close"
    return Response(error_body(error), error.status, headers, media_type="application/json")
