"""What the grammars of the parsers share: llguidance's kind of Lark, in which a JSON Schema stands as ``%json {...}``."""

import json
from collections.abc import Callable, Sequence

from minivllm.text.reply import Function


def quoted(text: str) -> str:
    """A text as the grammar's literal."""
    return json.dumps(text, ensure_ascii=False)


def arguments(function: Function) -> str:
    """The JSON text of a function's arguments. Always an object, as nothing else is a call."""
    return "%json " + json.dumps({**function.parameters, "type": "object"}, ensure_ascii=False)


def choice(rule: str, functions: Sequence[Function], before: Callable[[str], str], after: str) -> list[str]:
    """The lines of a rule for one call of any of the functions: what stands ``before`` the arguments, given the name, the
    arguments, and what stands ``after`` them (both written as the grammar has it)."""
    names = [f"{rule}_{number}" for number in range(len(functions))]
    lines = [f"{rule}: {' | '.join(names)}"]
    for name, function in zip(names, functions, strict=True):
        lines += [f"{name}: {before(function.name)} {name}_arguments {after}", f"{name}_arguments: {arguments(function)}"]
    return lines


def json_choice(rule: str, functions: Sequence[Function], key: str = "arguments") -> list[str]:
    """``choice`` for calls that are JSON objects."""

    def before(name: str) -> str:
        return quoted(f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": ')

    return choice(rule, functions, before, quoted("}"))
