"""``mini-vllm generate``: prompts in, one JSON line per completion out.

Prompts come from the command line, a file or stdin. A ``.jsonl`` file, or lines that all begin with ``{``, hold an object each:
``{"prompt": "...", "max_tokens": 20, "seed": 1}``, whose fields beside the prompt are sampling settings of that line alone.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO

import msgspec

from minivllm.cli.options import LLM_OPTIONS, Parser, add_config, add_sampling, read_config, read_sampling
from minivllm.cli.start import load_llm
from minivllm.config import options
from minivllm.errors import InvalidOption, InvalidRequest
from minivllm.types import SETTLED, SamplingParams

DEFAULT_MAX_TOKENS: Final = 256  # a model without an end token would otherwise fill its whole context


@dataclass(frozen=True)
class Request:
    """One prompt and how to complete it."""

    prompt: str
    sampling: SamplingParams


def run(argv: Sequence[str]) -> int:
    """Complete every prompt and write the completions in the order of the prompts."""
    found = _parser().read(argv)
    base = {"max_tokens": DEFAULT_MAX_TOKENS, **read_sampling(found)}
    config = read_config(found)
    requests = list(read_requests(found, base))
    if not requests:
        raise InvalidOption("There is no prompt; give one as an argument, with --file, or on stdin.")
    llm = load_llm(config)
    try:
        with _output(found.output) as out, token_bar(_most_tokens(requests)) as progress:
            done = llm.generate([r.prompt for r in requests], [r.sampling for r in requests], progress)
            for completion in done:
                out.write(json.dumps(_record(completion), ensure_ascii=False) + "\n")
    finally:
        llm.close()
    return 0


def _parser() -> Parser:
    """The options of this command."""
    parser = Parser("generate", "Complete prompts; writes one JSON line each.", "[PROMPT ...] [options]")
    group = parser.add_argument_group("prompts")
    group.add_argument("prompts", nargs="*", metavar="PROMPT", help="a prompt; quote it")
    group.add_argument("-f", "--file", help="read prompts from FILE: one a line, or JSONL; - is stdin")
    group.add_argument("-o", "--output", help="write the JSON lines to FILE instead of stdout")
    add_sampling(parser)
    add_config(parser)
    add_config(parser, ("observe",), leave_out=frozenset(o.name for o in options()) - LLM_OPTIONS)
    return parser


def read_requests(found: Any, base: dict[str, Any]) -> Iterator[Request]:
    """Every prompt that the call names. Raises ``InvalidOption`` naming the line that cannot be read."""
    if found.prompts and found.file:
        raise InvalidOption("Give prompts as arguments or with --file, not both.")
    if found.prompts:
        for prompt in found.prompts:
            yield Request(prompt, _sampling(base, "The sampling options"))
        return
    name = found.file or "-"
    if name == "-" and found.file is None and sys.stdin.isatty():
        return
    lines = _lines(name)
    where = "stdin" if name == "-" else name
    is_jsonl = name.endswith(".jsonl") or all(line.lstrip().startswith("{") for _, line in lines)
    for number, line in lines:
        yield _json_request(line, f"{where} line {number}", base) if is_jsonl else Request(line, _sampling(base, where))


def _lines(name: str) -> list[tuple[int, str]]:
    """Number and text of every line that is not blank."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidOption(f"The prompts in {name} cannot be read ({error}).") from None
    return [(i, line.rstrip("\r")) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def _json_request(line: str, where: str, base: dict[str, Any]) -> Request:
    """Read one JSONL line."""
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise InvalidOption(f"{where} is not JSON: {error}.") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise InvalidOption(f'{where} must be a JSON object with a "prompt" text.')
    prompt = entry.pop("prompt")
    return Request(prompt, _sampling({**base, **entry}, where))


def _sampling(fields: dict[str, Any], where: str) -> SamplingParams:
    """Build checked sampling settings; unknown names and wrong types are refused."""
    known = [name for name in SamplingParams.__struct_fields__ if name not in SETTLED]
    if unknown := [name for name in fields if name not in known]:
        raise InvalidOption(f"{where}: there is no sampling field {unknown[0]!r}; there are {', '.join(known)}.")
    if isinstance(fields.get("stop"), str):
        fields = {**fields, "stop": [fields["stop"]]}
    if isinstance(bias := fields.get("logit_bias"), dict):
        fields = {**fields, "logit_bias": [[int(t) if t.isdecimal() else t, value] for t, value in bias.items()]}
    try:
        return msgspec.convert(fields, SamplingParams)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `$.")
        raise InvalidOption(f"{where}: {place.rstrip('`') or 'sampling'}: {what}.") from None
    except InvalidRequest as error:
        raise InvalidOption(f"{where}: {error}") from None


def _record(completion: Any) -> dict[str, Any]:
    """A completion as its JSON line."""
    found = {"logprobs": msgspec.to_builtins(completion.logprobs)} if completion.logprobs else {}
    return {
        "prompt": completion.prompt,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "num_prompt_tokens": len(completion.prompt_ids),
        "num_output_tokens": len(completion.token_ids),
        **found,
    }


def _most_tokens(requests: Sequence[Request]) -> int | None:
    """The most tokens that may come, for the bar's end; None when a request has no limit."""
    limits = [r.sampling.max_tokens and r.sampling.max_tokens * r.sampling.n for r in requests]
    return sum(n for n in limits if n) if all(limits) else None


@contextmanager
def _output(path: str | None) -> Iterator[TextIO]:
    """Where the lines go."""
    if path is None:
        yield sys.stdout
        return
    try:
        file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115 - closed by the with below
    except OSError as error:
        raise InvalidOption(f"--output {path} cannot be written ({error.strerror}).") from None
    with file:
        yield file


@contextmanager
def token_bar(total: int | None) -> Iterator[Callable[[int], None] | None]:
    """A progress bar in tokens and tokens/s on stderr; none when stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit=" tokens", unit_scale=True, dynamic_ncols=True, file=sys.stderr) as bar:

        def add(num_tokens: int) -> None:
            bar.update(num_tokens)

        yield add
