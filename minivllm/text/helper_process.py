"""The child of ``helper.py``: does one job after another until its socket closes."""

import contextlib
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

from minivllm.child import FrameReader, be_child, encode
from minivllm.errors import InvalidRequest
from minivllm.text.helper import Begin, Done, Refused, Render, Template, ToHelper, Try, Words

_NICENESS = 5  # the model's cores come first
Worker = Callable[[object], str]


def main() -> int:
    """Entry of the child: ``python -m minivllm.text.helper_process FD``."""
    sock = be_child(int(sys.argv[1]))
    os.nice(_NICENESS)
    frames = FrameReader(ToHelper)  # type: ignore[arg-type]
    worker: Worker = _nothing
    with contextlib.suppress(ConnectionError):  # the parent has gone
        while data := sock.recv(1 << 18):
            for message in frames.feed(data):
                if isinstance(message, Begin):
                    worker = _worker(message)
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what a stranger's program makes libraries print is no log
                    sock.sendall(encode(Done()))
                else:
                    sock.sendall(encode(_done(worker, message)))
    return 0


def _worker(begin: Begin) -> Worker:
    """Who does the jobs of this child; from now on its memory is limited."""
    worker = _renderer(begin.setup) if isinstance(begin.setup, Template) else _trier(begin.setup)
    if (limit := _virtual_bytes()) is not None:
        resource.setrlimit(resource.RLIMIT_AS, (limit + begin.memory_bytes,) * 2)
    return worker


def _renderer(setup: Template) -> Worker:
    from minivllm.text.chat import ChatTemplate

    template = ChatTemplate(setup.source, setup.special_tokens)

    def render(job: object) -> str:
        if not isinstance(job, Render):
            raise InvalidRequest("This helper renders chats.")
        return template.render(
            job.messages,
            add_generation_prompt=job.add_generation_prompt,
            continue_final_message=job.continue_final_message,
            **job.values,
        )

    return render


def _trier(setup: Words) -> Worker:
    from minivllm.text.grammar import try_out, words_of

    words = words_of(setup.tokenizer, setup.vocab_size, setup.eos_token_ids)

    def try_grammar(job: object) -> str:
        if not isinstance(job, Try):
            raise InvalidRequest("This helper tries grammars.")
        try_out(job.grammar, words)
        return ""

    return try_grammar


def _done(worker: Worker, job: object) -> Done | Refused:
    try:
        return Done(worker(job))
    except InvalidRequest as refused:
        return Refused(refused.message, refused.param)
    except MemoryError:
        os._exit(1)  # as if the system had ended it: the parent says why


def _nothing(_: object) -> str:
    raise InvalidRequest("The helper was given no duty.")


def _virtual_bytes() -> int | None:
    """Address space of this process now; None where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return None


if __name__ == "__main__":
    sys.exit(main())
