"""What a completion request says of a beam search, and what it may not say beside it.

A search looks at raw logprobs and draws nothing. So a field that shapes what is drawn, or ends a text in another way than its
end-of-text token, would have no effect: it is refused by name.
"""

import msgspec

from minivllm.beams import BeamSearchParams
from minivllm.errors import InvalidRequest
from minivllm.server.protocol import CompletionBody, logprobs_of, sampling_of
from minivllm.types import SamplingParams

# A search has no random numbers, so that a seed is kept whatever it is. The others have a meaning of their own here.
_TAKEN = frozenset(
    {"n", "seed", "max_tokens", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "logprobs"}
)
_NO_TEMPERATURE = (None, 0.0, 1.0)  # 1: logprobs are what they are


def check_beams(body: CompletionBody) -> bool:
    """Whether a request asks for a beam search. Raises ``InvalidRequest`` for what one cannot have, or what only one can."""
    if not body.use_beam_search:
        if body.length_penalty not in (None, 1.0):
            raise InvalidRequest("length_penalty has no effect without use_beam_search; leave it out.", "length_penalty")
        return False
    told = {"stream": body.stream, "explain": body.explain,
            "response_format": body.response_format and body.response_format.type != "text",
            "structured_outputs": body.structured_outputs, "best_of": body.best_of not in (None, body.n or 1),
            "temperature": body.temperature not in _NO_TEMPERATURE,
            "echo": body.echo and logprobs_of(body.logprobs) is not None}  # fmt: skip
    plain, asked = SamplingParams(), sampling_of(msgspec.structs.replace(body, n=1, temperature=None))
    for name in SamplingParams.__struct_fields__:
        told.setdefault(name, name not in _TAKEN and getattr(asked, name) != getattr(plain, name))
    for name, refused in told.items():
        if refused:
            beside = " with logprobs" if name == "echo" else ""
            raise InvalidRequest(f"A beam search has no {name}{beside}; leave out use_beam_search or this field.", name)
    return True


def beams_of(body: CompletionBody, default_max_tokens: int) -> BeamSearchParams:
    """The search that a request asks for; ``check_beams`` said that it asks for one. Raises ``InvalidRequest``."""
    return BeamSearchParams(
        beam_width=1 if body.n is None else body.n,
        max_tokens=default_max_tokens if body.max_tokens is None else body.max_tokens,
        length_penalty=1.0 if body.length_penalty is None else body.length_penalty,
        ignore_eos=bool(body.ignore_eos),
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        logprobs=logprobs_of(body.logprobs),
    )
