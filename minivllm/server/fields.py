"""Request fields that this server knows of but does not serve, and how a body is checked against them.

Clients send whole forms: ``n=1``, ``logprobs=false``, ``tools=[]``. A field at a value that changes nothing is let through;
any other value is refused by name, because an ignored ``echo`` is a wrong answer that looks right. A field that
nobody knows is refused by name too. So each field of a body is served, without effect, on the list of harmless ones, or a
400. Serving a field means taking it out of this table and putting it into ``protocol.py``.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import msgspec

from minivllm.errors import MalformedBody, UnsupportedField
from minivllm.text.depth import check_depth

Values = Mapping[str, tuple[Any, ...]]

# Field -> values without effect. null is always one of them.
NOT_SERVED: Values = MappingProxyType(
    {
        # both OpenAI routes
        "best_of": (1,),
        "use_beam_search": (False,),
        "length_penalty": (1, 1.0),
        "echo": (False,),
        "suffix": ("",),
        "thinking_token_budget": (),
        "spaces_between_special_tokens": (True,),
        "prompt_embeds": (),
        "return_token_offsets": (False,),
        "return_prompt_text": (False,),
        "request_id": (),
        "kv_transfer_params": (),
        "vllm_xargs": ({},),
        # chat
        "functions": ([],),
        "function_call": ("none",),
        "verbosity": (),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
        "chat_template": (),
        "media_io_kwargs": ({},),
        "mm_processor_kwargs": ({},),
        "store": (False,),
        "moderation": (),
    }
)

# Fields that label a request or steer what does not exist here (billing, caches of another kind); any value is let through.
HARMLESS = frozenset(
    {
        "user",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)

# Fields of a chat message that clients hand back as they got them.
MESSAGE_NOT_SERVED: Values = MappingProxyType(
    {
        "refusal": (),
        "annotations": ([],),
        "audio": (),
        "function_call": (),
    }
)

NATIVE_NOT_SERVED: Values = MappingProxyType({"stream": (True,)})  # /generate always streams

F = TypeVar("F", bound=msgspec.Struct)
_PLACE = re.compile(r" - at `\$(.*)`$")


class Form(Generic[F]):
    """How one route's body is read: a Struct for what is served, a table for what is known besides. Never changes."""

    def __init__(self, path: str, struct: type[F], not_served: Values, harmless: frozenset[str] = frozenset()) -> None:
        self.path = path
        self.struct = struct
        self.not_served = not_served
        self.harmless = harmless
        self._served = frozenset(f.encode_name for f in msgspec.structs.fields(struct))
        self._decoder = msgspec.json.Decoder(struct)
        self._shallow = msgspec.json.Decoder(dict[str, msgspec.Raw])

    def read(self, body: bytes) -> F:
        """The body as a Struct. Raises ``MalformedBody`` or ``UnsupportedField``, each naming the field at fault."""
        check_depth(body)
        try:
            self._check_names(self._shallow.decode(body))
            return self._decoder.decode(body)
        except msgspec.ValidationError as e:
            place = _PLACE.search(str(e))
            param = "body" + (place[1] if place else "")
            raise MalformedBody(f"{_PLACE.sub('', str(e))} at {param}.", param) from None
        except RecursionError:
            raise MalformedBody("The body is nested too deeply; send a flat JSON object.", "body") from None
        except (msgspec.DecodeError, UnicodeError):
            raise MalformedBody("The body is not valid JSON in UTF-8; send one JSON object.", "body") from None

    def _check_names(self, fields: Mapping[str, msgspec.Raw]) -> None:
        """Every name is served, harmless, or at a value without effect."""
        for name, raw in fields.items():
            if name not in self._served and name not in self.harmless:
                check_not_served(name, msgspec.json.decode(raw) if name in self.not_served else None, self.not_served)


def check_not_served(name: str, value: object, table: Values) -> None:
    """Raise unless ``value`` of the field ``name`` changes nothing; ``1`` and ``true`` are different values."""
    if name not in table:
        shown = name if len(name) <= 64 else name[:64] + "..."
        raise MalformedBody(f"This route has no field '{shown}'; leave it out.", shown)
    if value is not None and not any(type(v) is type(value) and v == value for v in table[name]):
        raise UnsupportedField(name)
