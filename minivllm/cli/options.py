"""Command-line options, reflected from where they are declared.

``config.options()`` says what the engine and the server take, ``types.SamplingParams`` what a request takes; this file turns
those declarations into argparse options, help pages, environment defaults and the README's table, so none of them can drift.

The rules of every command: ``--max-num-seqs`` and ``--max_num_seqs`` are the same; a boolean has a ``--no-...`` form; sizes may
be written 4k, 4K, 1.5M or 2G (small letter: powers of 1000, capital: of 1024); plain ``--help`` shows the common options,
``--help=all`` every one, ``--help=cache`` one group; ``MINIVLLM_MAX_NUM_SEQS`` in the environment is a default that the command
line overrides; a mistake is one sentence (``InvalidOption``), not a usage page.
"""

import argparse
import difflib
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from minivllm.config import Config, Option, environment, make_config, options
from minivllm.errors import InvalidOption

TITLES: Final[Mapping[str, str]] = {
    "model": "model",
    "cache": "KV cache",
    "scheduler": "scheduler",
    "runner": "runner",
    "server": "server",
    "observe": "records of steps",
}
ENGINE_SECTIONS: Final = ("model", "cache", "scheduler", "runner")
LLM_OPTIONS: Final = frozenset({"record_steps"})  # of other sections, those that an ``LLM`` without a server takes
ALL_SECTIONS: Final = (*ENGINE_SECTIONS, "server", "observe")
_SIZED: Final = frozenset({"max_model_len", "max_num_batched_tokens"})  # besides the names that end in _bytes
_SUFFIXES: Final[Mapping[str, int]] = {
    "": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40,
}  # fmt: skip


def parse_size(text: str) -> int:
    """Return the whole number that ``text`` writes, with an optional unit: 1k = 1000, 1K = 1024; also m/M, g/G, t/T."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgtKMGT]?)(?:i?B)?", text.strip())
    if match is None:
        raise ValueError("a size such as 4096, 4k (4000) or 4K (4096)")
    return int(float(match[1]) * _SUFFIXES[match[2]]) if "." in match[1] else int(match[1]) * _SUFFIXES[match[2]]


def _whole(text: str) -> int:
    """``int`` with a hint that fits into an error sentence."""
    try:
        return int(text)
    except ValueError:
        raise ValueError("a whole number") from None


def _number(text: str) -> float:
    """``float`` with a hint that fits into an error sentence."""
    try:
        return float(text)
    except ValueError:
        raise ValueError("a number") from None


def _truth(text: str) -> bool:
    """Read a boolean of the environment."""
    if (word := text.strip().lower()) not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
        raise ValueError("true or false")
    return word in ("1", "true", "yes", "on")


def _one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """A converter to one of ``choices``, which may be written with ``_`` for ``-``."""

    def convert(text: str) -> str:
        for choice in choices:
            if text == choice or text.replace("_", "-") == choice:
                return choice
        raise ValueError("one of " + ", ".join(choices))

    return convert


def _pair(text: str) -> tuple[int, float]:
    """Read a token id and its number."""
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise ValueError("a token id and a number, as in 42=-100") from None


def _grammar(text: str) -> Any:
    """Read what a text has to be."""
    from minivllm.types import Grammar

    kind, colon, source = text.partition(":")
    kinds: tuple[str, ...] = get_args(get_type_hints(Grammar)["kind"])
    if not colon or not source or kind not in kinds:
        raise ValueError(f"a kind ({', '.join(kinds)}), a colon and the grammar, as in regex:[a-z]+")
    return Grammar(kind, source)  # type: ignore[arg-type]  # one of the kinds


def plain_type(annotation: Any) -> Any:
    """The type without ``| None``."""
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [a for a in get_args(annotation) if a is not type(None)]
        return rest[0]
    return annotation


def converter(name: str, annotation: Any) -> Callable[[str], Any]:
    """How one word of text becomes a value (an item, for tuples) of ``annotation``. It raises ``ValueError`` with a hint."""
    kind = plain_type(annotation)
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return _one_of([str(c) for c in get_args(kind)])
    if get_origin(kind) is tuple:
        return _pair
    if kind is int:
        return parse_size if name in _SIZED or name.endswith("_bytes") else _whole
    plain: dict[Any, Callable[[str], Any]] = {bool: _truth, float: _number, str: str}
    return plain.get(kind, _grammar)


# ----------------------------------------------------------------------------------------------------------------------
# The parser of a command
# ----------------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse with our rules. Written by the command that builds it."""

    def __init__(self, command: str, description: str, usage: str = "[options]") -> None:
        super().__init__(
            prog=f"mini-vllm {command}",
            description=description,
            usage=f"mini-vllm {command} {usage}",
            add_help=False,
            allow_abbrev=False,
            formatter_class=_Help,
        )
        self.command = command
        self.add_argument("-h", "--help", nargs="?", const="common", metavar="all|GROUP", help="this page, all, or one group")

    def error(self, message: str) -> NoReturn:
        """Turn argparse's complaint into one sentence."""
        message = re.sub(r"argument ((?:-\w+/)?(--[\w-]+)\S*|[\w.]+): ", lambda m: f"{m[2] or m[1]}: ", message)
        raise InvalidOption(f"{message.rstrip('.')}; `mini-vllm {self.command} --help` lists the options.")

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse ``argv``; prints help and ends the program where it is asked for. Raises ``InvalidOption``."""
        words = normalise(argv)
        if (topic := help_topic(words)) is not None:
            self.print_topic(topic)
            raise SystemExit(0)
        found, unknown = self.parse_known_args(words)
        if unknown:
            self._refuse(unknown[0])
        return found

    def _refuse(self, word: str) -> NoReturn:
        """Say that ``word`` is no option here, with the nearest name."""
        if not word.startswith("-"):
            raise InvalidOption(f"{word!r} is one argument too many; put texts with spaces in quotes.")
        known = [f for action in self._actions for f in action.option_strings]
        flag = word.partition("=")[0]
        near = difflib.get_close_matches(flag, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"`mini-vllm {self.command} --help=all` lists them."
        raise InvalidOption(f"There is no option {flag}; {hint}")

    def print_topic(self, topic: str) -> None:
        """Print the common options, all of them, or one group's."""
        groups = {str(g.title).lower(): g for g in self._action_groups if g.title and g._group_actions}
        if topic not in ("common", "all"):
            names = [name for name in groups if topic.lower() in name.split() or topic.lower() == name]
            if not names:
                raise InvalidOption(f"There is no help on {topic!r}; groups: all, {', '.join(groups)}.")
            groups = {name: groups[name] for name in names}
        for group in self._action_groups:
            group._group_actions[:] = [a for a in group._group_actions if topic == "common" or group in groups.values()]
            for action in group._group_actions:
                if isinstance(action.help, _Rare):
                    action.help = argparse.SUPPRESS if topic == "common" else str(action.help)
        if topic == "common" and any(a.help == argparse.SUPPRESS for a in self._actions):
            self.epilog = f"Less common options: mini-vllm {self.command} --help=all"
        self.print_help()


class _Rare(str):
    """The help of an option that plain ``--help`` leaves out."""


class _Help(argparse.HelpFormatter):
    """Help lines with room for our names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=118)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Show a boolean as ``--[no-]x`` and the value's name once."""
        if isinstance(action, argparse.BooleanOptionalAction):
            return "--[no-]" + action.option_strings[0].removeprefix("--")
        if action.option_strings and action.nargs != 0:
            value = self._format_args(action, self._get_default_metavar_for_optional(action))
            return f"{', '.join(action.option_strings)} {value}"
        return super()._format_action_invocation(action)


def normalise(argv: Sequence[str]) -> list[str]:
    """Write every option name with hyphens: ``--max_num_seqs=4`` becomes ``--max-num-seqs=4``. Values stay as they are."""
    words = list(argv)
    end = words.index("--") if "--" in words else len(words)
    for i, word in enumerate(words[:end]):
        if re.match(r"--[A-Za-z]\w*(-\w+)*(=|$)", word):
            name, equals, value = word.partition("=")
            words[i] = name.replace("_", "-") + equals + value
    return words


def help_topic(words: Sequence[str]) -> str | None:
    """What help is asked for: "common", "all", a group's name, or None."""
    for i, word in enumerate(words):
        if word == "--":
            return None
        if word in ("-h", "--help"):
            following = words[i + 1] if i + 1 < len(words) else ""
            return following if following.isalpha() else "common"
        if word.startswith("--help="):
            return word.removeprefix("--help=") or "common"
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Options of the engine and the server
# ----------------------------------------------------------------------------------------------------------------------


def add_config(parser: Parser, sections: Sequence[str] = ENGINE_SECTIONS, leave_out: frozenset[str] = frozenset()) -> None:
    """Add the options of ``sections``, one help group each. Defaults stay out of the namespace: ``read_config`` knows them."""
    for section in sections:
        group = parser.add_argument_group(TITLES[section])
        for option in options():
            if option.section == section and option.name not in leave_out:
                _add(group, option)


def _add(group: argparse._ArgumentGroup, option: Option) -> None:
    """Add one option to its group."""
    text = option.opt.help + ("" if option.default is None else f" [{_shown(option.default)}]")
    text = text.replace("%", "%%")
    common: dict[str, Any] = {
        "dest": option.name,
        "default": argparse.SUPPRESS,
        "help": text if option.opt.common else _Rare(text),
    }
    flags = (option.flag, *option.opt.flags)
    kind = plain_type(option.type)
    if kind is bool:
        group.add_argument(*flags, action=argparse.BooleanOptionalAction, **common)
        return
    if get_origin(kind) is tuple:
        common |= {"action": "append"} if option.opt.repeat else {"nargs": "+"}
    metavar = "{" + ",".join(get_args(kind)) + "}" if get_origin(kind) is Literal else option.name.rpartition("_")[2].upper()
    group.add_argument(*flags, type=_told(converter(option.name, option.type)), metavar=metavar, **common)


def _told(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Let argparse print the converter's own hint."""

    def wrapped(text: str) -> Any:
        try:
            return convert(text)
        except ValueError as hint:
            raise argparse.ArgumentTypeError(f"{text!r} is not {hint}") from None

    return wrapped


def add_model_argument(parser: Parser) -> None:
    """Let the model be named without ``--model``; ``read_config`` takes it from either place."""
    parser.add_argument("model_name", nargs="?", metavar="MODEL", help="folder or hub name; none: the bundled model")


def read_config(found: argparse.Namespace) -> Config:
    """Build the ``Config``: the command line, else the environment, else the declared default. Raises ``InvalidOption``."""
    values: dict[str, Any] = {}
    given = dict(vars(found))
    if (name := given.get("model_name")) is not None and given.setdefault("model", name) != name:
        raise InvalidOption(f"The model is named twice, {name!r} and {given['model']!r}; name it once.")
    known = {o.name: o for o in options()}
    for name, text in environment().items():
        if name not in given:
            values[name] = _from_environment(known[name], text)
    for name in known:
        if name in given:
            value = given[name]
            values[name] = tuple(value) if isinstance(value, list) else value
    return make_config(**values)


def flat_options(config: Config) -> dict[str, Any]:
    """The engine's options by name, as ``LLM(**options)`` takes them."""
    taken = [o for o in options() if o.section in ENGINE_SECTIONS or o.name in LLM_OPTIONS]
    return {o.name: getattr(getattr(config, o.section), o.name) for o in taken}


def _from_environment(option: Option, text: str) -> Any:
    """Convert an environment value; a tuple is written with commas."""
    convert = converter(option.name, option.type)
    try:
        if get_origin(plain_type(option.type)) is tuple:
            return tuple(convert(word.strip()) for word in text.split(",") if word.strip())
        return convert(text)
    except ValueError as hint:
        raise InvalidOption(f"MINIVLLM_{option.name.upper()} in the environment must be {hint}, got {text!r}.") from None


# ----------------------------------------------------------------------------------------------------------------------
# Options of a request
# ----------------------------------------------------------------------------------------------------------------------


def add_sampling(parser: Parser, leave_out: frozenset[str] = frozenset({"seed"})) -> None:
    """Add an option for each field of ``SamplingParams``. ``seed`` is left out where the engine's own --seed is an option."""
    from minivllm.types import SETTLED, SamplingParams

    group = parser.add_argument_group("sampling")
    plain = SamplingParams()
    for name, annotation in get_type_hints(SamplingParams).items():
        if name in leave_out or name in SETTLED:
            continue
        default = getattr(plain, name)
        common: dict[str, Any] = {
            "dest": f"sampling.{name}",
            "default": argparse.SUPPRESS,
            "help": "" if default in (None, ()) else f"[{_shown(default)}]",
        }
        kind = plain_type(annotation)
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
            continue
        if get_origin(kind) is tuple:
            common["nargs"] = "+"
        item = get_args(kind)[0] if get_origin(kind) is tuple else kind
        others = "ID=X" if item is not kind else "KIND:TEXT"
        metavar = {int: "ID" if item is not kind else "N", float: "X", str: "TEXT"}.get(item, others)
        group.add_argument(flag, type=_told(converter(name, annotation)), metavar=metavar, **common)


def read_sampling(found: argparse.Namespace) -> dict[str, Any]:
    """The sampling fields that were given, for ``SamplingParams(**...)``."""
    given = {k.removeprefix("sampling."): v for k, v in vars(found).items() if k.startswith("sampling.")}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def as_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same fields as a server takes them."""
    told = dict(fields)
    if "logit_bias" in told:
        told["logit_bias"] = {str(token): value for token, value in told["logit_bias"]}
    if (grammar := told.pop("grammar", None)) is not None:
        told["structured_outputs"] = {"grammar" if grammar.kind == "lark" else grammar.kind: grammar.source}
    return told


# ----------------------------------------------------------------------------------------------------------------------
# The README's table
# ----------------------------------------------------------------------------------------------------------------------


def _shown(value: Any) -> str:
    """A default as the docs show it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(str(v) for v in value) or "none"
    text = "none" if value is None else str(value)
    return "bundled" if text.endswith("assets/stories") else text


def markdown() -> str:
    """Every option as a table, for the README (``python -m minivllm.cli.options``)."""
    lines = ["| option | default | what it does |", "|---|---|---|"]
    for section in ALL_SECTIONS:
        lines.append(f"| **{TITLES[section]}** | | |")
        for option in options():
            if option.section == section:
                kind = plain_type(option.type)
                choices = f" ({', '.join(get_args(kind))})" if get_origin(kind) is Literal else ""
                flags = ", ".join(f"`{f}`" for f in (option.flag, *option.opt.flags))
                lines.append(f"| {flags} | {_shown(option.default)} | {option.opt.help}{choices} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(markdown() + "\n")
