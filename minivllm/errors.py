"""Every error a user can meet, with its HTTP status and its remedy, in one place.

Two families. ``RequestError`` is about one request: it becomes one JSON error body (``server/protocol.py``) and the server
goes on serving. ``StartupError`` is about the model folder, the options or the machine: the command prints the sentence and
exits with ``exit_code``. The text of every error says what is wrong *and* what to do about it, in one sentence.
"""

import math
from collections.abc import Sequence


class MiniVLLMError(Exception):
    """Base of all errors that are meant for a user's eyes."""


class RequestError(MiniVLLMError):
    """One request cannot be served; the others go on.

    ``status`` is the HTTP status, ``kind`` the ``type`` of the OpenAI error body, ``param`` the field that is at fault.
    """

    status = 400
    kind = "BadRequestError"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(RequestError):
    """A field has a value that cannot be served."""


class MalformedBody(RequestError):
    """The body is not the JSON object that this route takes."""

    kind = "Bad Request"


class UnsupportedField(RequestError):
    """A field that this server knows but does not serve, given with a value that would change the answer."""

    def __init__(self, field: str, hint: str = "leave it out") -> None:
        super().__init__(f"The field '{field}' is not supported by this server with this value; {hint}.", param=field)


class ContextTooLong(RequestError):
    """Prompt plus requested output do not fit into the model's context."""

    def __init__(self, max_model_len: int, num_prompt: int, max_tokens: int) -> None:
        super().__init__(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested {max_tokens} output "
            f"tokens and your prompt contains {num_prompt} input tokens, for a total of {num_prompt + max_tokens} tokens. "
            "Please reduce the length of the input prompt or the number of requested output tokens.",
            param="input_tokens",
        )


class UnknownModel(RequestError):
    """The request names a model that is not served here."""

    status = 404
    kind = "NotFoundError"

    def __init__(self, name: str, served: Sequence[str]) -> None:
        shown = name if len(name) <= 100 else name[:100] + "..."
        super().__init__(f"The model `{shown}` does not exist. This server serves: {', '.join(served)}.", param="model")


class UnknownRequest(RequestError):
    """Nobody remembers the request, or it is somebody else's."""

    status = 404
    kind = "NotFoundError"

    def __init__(self, name: str, kept: int) -> None:
        shown = name if len(name) <= 100 else name[:100] + "..."
        which = f"among those that run and the last {kept} that ended" if kept else "to be told of: --step-records is 0"
        super().__init__(f"There is no request `{shown}` {which}; ask with the id of its reply.", param="id")


class ForeignOrigin(RequestError):
    """A web page of another origin tried to use the native route from somebody's browser."""

    status = 403
    kind = "Forbidden"

    def __init__(self) -> None:
        super().__init__("This route does not answer web pages of another origin; call it from its own origin or a program.")


class PayloadTooLarge(RequestError):
    """The body is longer than the server accepts."""

    status = 413
    kind = "Payload Too Large"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"The request body is longer than the {limit_bytes} bytes that this server accepts; send less text.")


class UnsupportedEncoding(RequestError):
    """The body is compressed; unpacking what a stranger packed has no bound."""

    status = 415
    kind = "Unsupported Media Type"

    def __init__(self) -> None:
        super().__init__("Compressed request bodies are not accepted; send the body without Content-Encoding.")


class HeadersTooLong(RequestError):
    """Request line and headers are longer than the server accepts."""

    status = 431
    kind = "Request Header Fields Too Large"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"Request line and headers are longer than the {limit_bytes} bytes accepted here; send fewer headers.")


class RequestTooSlow(RequestError):
    """Headers or body did not arrive within their time."""

    status = 408
    kind = "Request Timeout"

    def __init__(self, part: str, limit_s: float) -> None:
        super().__init__(f"The request's {part} did not arrive within {limit_s:g} s; send the request again.")


class ServerOverloaded(RequestError):
    """The queue is full; come back later."""

    status = 503
    kind = "ServiceUnavailableError"

    def __init__(self, retry_after_s: int = 1) -> None:
        super().__init__(f"The server's queue is full; retry in {retry_after_s} s.")
        self.retry_after_s = retry_after_s


class QueueTimeout(RequestError):
    """The request waited its time without getting its turn."""

    status = 503
    kind = "ServiceUnavailableError"

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"The request waited {limit_s:g} s in the queue without its turn; retry later.")
        self.retry_after_s = max(1, min(math.ceil(limit_s), 60))


class TooManyRequests(RequestError):
    """One tenant uses more than its share; ``limit`` is a sentence without its end."""

    status = 429
    kind = "RateLimitError"

    def __init__(self, limit: str, retry_after_s: int) -> None:
        super().__init__(f"{limit}; retry in {retry_after_s} s.")
        self.retry_after_s = retry_after_s


class TooManyConnections(RequestError):
    """The server has as many connections as it may have."""

    status = 503
    kind = "ServiceUnavailableError"
    retry_after_s = 1

    def __init__(self) -> None:
        super().__init__("The server has as many connections as it can serve; retry in a moment.")


class TooManyReaders(RequestError):
    """As many clients as may stream the engine's steps do so."""

    status = 503
    kind = "ServiceUnavailableError"
    retry_after_s = 10

    def __init__(self, most: int) -> None:
        super().__init__(f"{most} clients stream steps, and more may not; ask for pages (GET /steps?since=N), or retry later.")


class ServerDraining(RequestError):
    """The server was asked to stop and takes no new work."""

    status = 503
    kind = "ServiceUnavailableError"

    def __init__(self) -> None:
        super().__init__("The server is shutting down and takes no new requests; send the request to another server.")


class GenerationFailed(RequestError):
    """The engine could not finish this request, through no fault of the client."""

    status = 500
    kind = "InternalServerError"


class EngineDead(GenerationFailed):
    """The engine process has ended; nothing can be generated until the server is started again."""

    def __init__(self) -> None:
        super().__init__("The engine process has ended, so this request cannot be finished; the server is stopping.")


class RequestTimedOut(GenerationFailed):
    """The request took longer than the server lets one run."""

    status = 504
    kind = "TimeoutError"

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"The request was not finished within {limit_s:g} s; ask for fewer tokens.")


class ServerStopped(GenerationFailed):
    """The server ended before the request did."""

    status = 503
    kind = "ServiceUnavailableError"

    def __init__(self) -> None:
        super().__init__("The server was stopped before this request was finished; send it again to another server.")


class StartupError(MiniVLLMError):
    """The command cannot start; it prints the sentence and exits with ``exit_code``."""

    exit_code = 2


class InvalidOption(StartupError):
    """An option has a value that cannot be used."""


class ModelNotFound(StartupError):
    """The model is neither a folder nor a name that could be fetched."""


class BrokenModelFolder(StartupError):
    """The folder is there, but a file in it is missing, truncated or contradicts another."""


class PicklesOnly(StartupError):
    """The folder has weights only in pickle files, which could run code when opened."""


class UnsupportedModel(StartupError):
    """The model is whole, but something in it is not served here."""


class NotEnoughMemory(StartupError):
    """The model or its cache does not fit into the memory it was given."""


class BadRecording(StartupError):
    """A file is no recording of steps, or it is damaged."""


class PortInUse(StartupError):
    """The address to listen on is taken or not allowed."""


class OutOfDeviceMemory(Exception):
    """A step did not fit into what is left of the device's memory. No user meets it: the engine makes smaller steps."""


class RequestFault(Exception):
    """A step failed at what it does for one request alone. No user meets it: the engine ends that request, and says so."""

    def __init__(self, uid: int) -> None:
        super().__init__(f"a step failed at request {uid}")
        self.uid = uid


class DeviceLost(MiniVLLMError):
    """The device reports the same error at every call (an illegal access, a failed assertion): only a new process can use it
    again. The engine process ends with ``exit_code``."""

    exit_code = 3
