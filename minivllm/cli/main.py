"""``mini-vllm COMMAND``: find the command, run it, end well.

A command is a module with ``run(argv) -> int``, imported when it is picked: ``--help`` answers without torch or numpy. This is
also the one place where the errors of a start become a sentence and an exit code.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Final

from minivllm import __version__
from minivllm.errors import MiniVLLMError, StartupError

COMMANDS: Final[Mapping[str, tuple[str, str]]] = {
    "serve": ("minivllm.cli.serve", "serve a model over HTTP (no model given: the bundled one)"),
    "generate": ("minivllm.cli.generate", "complete prompts from arguments, a file or stdin, as JSONL"),
    "chat": ("minivllm.cli.chat", "talk to a model in the terminal"),
    "bench": ("minivllm.cli.bench", "measure: throughput, latency, serve"),
    "learn": ("minivllm.cli.learn", "one workload on every rung from no cache to the whole engine, measured"),
    "explain": ("minivllm.cli.explain", "say why the requests of a recording took as long as they did"),
    "trace": ("minivllm.cli.trace", "draw a recording as a trace for Perfetto"),
    "models": ("minivllm.cli.models", "list the models on this machine, or fetch one"),
}
INTERRUPTED: Final = 130  # 128 + SIGINT, as shells count
PIPE_CLOSED: Final = 141  # 128 + SIGPIPE


def usage() -> str:
    """The page of ``mini-vllm --help``."""
    lines = [f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join([
        "usage: mini-vllm COMMAND [options]",
        "",
        "A small LLM inference engine and server.",
        "",
        "commands:",
        *lines,
        "",
        "mini-vllm COMMAND --help shows a command's common options, --help=all every one.",
        "mini-vllm --version prints the version.",
    ])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 2 a mistake in the call or the model, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader (head, less) has gone. Python would complain again when it flushes at exit, so give it a sink.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except KeyboardInterrupt:
        return INTERRUPTED
    except MiniVLLMError as error:
        sys.stderr.write(f"mini-vllm: error: {error}\n")
        return error.exit_code if isinstance(error, StartupError) else 1


def _dispatch(words: Sequence[str]) -> int:
    """Find the command that ``words`` begin with and run it."""
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage() + "\n")
        return 0 if words else 2
    if words[0] in ("-V", "--version", "version"):
        sys.stdout.write(f"mini-vllm {__version__}\n")
        return 0
    if words[0] not in COMMANDS:
        sys.stderr.write(f"mini-vllm: error: There is no command {words[0]!r}; there are {', '.join(COMMANDS)}.\n")
        return 2
    run = import_module(COMMANDS[words[0]][0]).run
    return int(run(words[1:]))
