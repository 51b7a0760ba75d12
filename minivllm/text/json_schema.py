"""What a JSON Schema asks that the grammar made of it would not hold, and how its texts must be spelled so that it does.

llguidance refuses every keyword of JSON Schema that it does not follow (``uniqueItems``, ``not``, ``if`` ...), so what it
takes it mostly holds: each text that the grammar lets through is valid. Measured against the standard's own test suite, two
things are left, both about names of properties:

* A name that the schema does not know may come twice. To JSON that is one property, but the grammar counts two: so a
  ``minProperties`` that only such names can fill is refused here.
* JSON can spell one name in many ways (``"a"`` is ``"\\u0061"``). The grammar would take the second for a name that it does
  not know and let any value follow. So where unknown names may stand beside known ones, there are no ``\\u`` escapes at all and
  each text has one spelling. What is lost there are control characters in strings, apart from those with a letter (``\\n``).

Only places where schemas stand are looked at; ``enum``, ``const``, ``default`` and ``examples`` hold plain data.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from minivllm.errors import InvalidRequest

DATA: Final = frozenset({"enum", "const", "default", "examples"})
SCHEMAS_BY_NAME: Final = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_LETTERS: Final = r"nrbtf\""  # what may follow a backslash


def parts(schema: Any) -> Iterator[Mapping[str, Any]]:
    """A schema and all schemas inside it."""
    waiting = [(schema, False)]
    while waiting:
        node, is_by_name = waiting.pop()
        if isinstance(node, list):
            waiting += [(item, False) for item in node]
        elif isinstance(node, Mapping):
            if not is_by_name:
                yield node
            inside = node.items() if is_by_name else [(key, value) for key, value in node.items() if key not in DATA]
            waiting += [(value, not is_by_name and key in SCHEMAS_BY_NAME) for key, value in inside]


def check_schema(schema: Any) -> None:
    """Raises ``InvalidRequest`` for a schema whose grammar would let invalid texts through."""
    for part in parts(schema):
        least, required = part.get("minProperties"), part.get("required")
        num_known = len(set(map(str, required))) if isinstance(required, list) else 0
        if isinstance(least, int | float) and least > num_known + 1:
            raise InvalidRequest(
                f"The JSON Schema uses `minProperties` ({least}), which cannot be enforced for names that it does not list; "
                "put names into `required`."
            )


def allowed_escapes(schema: Any) -> str:
    """What may follow a backslash in strings, so that every name has one spelling where that matters."""
    return _LETTERS if any(map(_mixes_names, parts(schema))) else _LETTERS + "u"


def _mixes_names(part: Mapping[str, Any]) -> bool:
    """Whether an object may have names that this part of a schema knows and others too."""
    knows = any(part.get(word) for word in ("properties", "required", "patternProperties"))
    return knows and (part.get("additionalProperties") is not False or bool(part.get("patternProperties")))


def reason_in_words(reason: str) -> str | None:
    """llguidance's reason to refuse a schema, for people who know JSON Schema and not llguidance. None: as it stands."""
    if found := re.search(r"Unimplemented keys: \[(.*?)\]", reason):
        keys = ", ".join(f"`{key}`" for key in re.findall(r'"(.*?)"', found[1]))
        return f"The JSON Schema uses {keys}, which cannot be enforced while a text is written; leave it out."
    if found := re.search(r"Resource '(.*?)' is not present", reason):
        return f"The JSON Schema refers to another document ({found[1]}), and none is fetched; put its parts under `$defs`."
    if "oneOf constraints are not supported" in reason:
        return "The JSON Schema uses `oneOf` with choices that may hold together, which cannot be enforced; use `anyOf`."
    return None
