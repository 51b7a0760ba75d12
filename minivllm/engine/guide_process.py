"""The child processes of ``guide_pool.py``: a nursery, which reads the vocabulary and forks workers, and a worker's two loops.

A worker's first thread follows texts, step by step. Its second makes new ones: a long schema takes some hundred milliseconds,
most of them without Python's lock, while the texts that run go on.
"""

import contextlib
import gc
import mmap
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Sequence
from ctypes import addressof, c_char
from typing import Final

from minivllm.child import FrameReader, be_child, encode
from minivllm.engine.guide import NO_ROW, Guide, GuideMaker
from minivllm.engine.guide_pool import DROP, OUTCOMES, PROBLEMS, SEAT, TELL, Begin, Made, Make, NotMade, read_frame
from minivllm.engine.numbers import NumberSocket
from minivllm.errors import InvalidRequest
from minivllm.text.grammar import words_of
from minivllm.types import BY_BITS, Grammar

_SWITCH_S: Final = 1e-4  # a maker gives way to a step at once


def main() -> int:
    """Entry of the nursery: ``python -m minivllm.engine.guide_process SOCKET MEMORY``."""
    control = be_child(int(sys.argv[1]))
    begin = read_frame(control, FrameReader(Begin))
    if not isinstance(begin, Begin):
        return 1
    words = words_of(begin.words.tokenizer, begin.words.vocab_size, begin.words.eos_token_ids)
    masks = mmap.mmap(int(sys.argv[2]), 0)
    control.sendall(encode(Made()))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a worker ended
    warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: numpy's, which wait for nothing
    gc.freeze()  # what is here now is shared
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 2)
        if not message:
            return 0  # the engine has gone
        if os.fork() == 0:
            control.close()
            steps = be_child(descriptors[0])  # again: it dies with the nursery
            maker = GuideMaker(lambda: words, begin.vocab_size)
            worker = WorkerLoop(maker, masks, begin)
            threading.Thread(target=worker.make, args=(socket.socket(fileno=descriptors[1]),), daemon=True).start()
            with contextlib.suppress(EOFError, OSError):
                worker.follow(NumberSocket(steps, begin.spin_s))
            os._exit(0)  # nothing of the nursery's is to be tidied up here
        for descriptor in descriptors:
            os.close(descriptor)


class WorkerLoop:
    """Some texts. Written by the worker's first thread; the second adds new ones."""

    def __init__(self, maker: GuideMaker, masks: mmap.mmap, begin: Begin) -> None:
        self._maker, self._masks = maker, masks
        self._row_bytes = begin.row_words * 4
        self._address = addressof(c_char.from_buffer(masks))
        self._words = memoryview(masks).cast("I")
        self._row_words = begin.row_words
        self._texts: dict[int, Guide] = {}
        self._rows: dict[int, int] = {}
        self._filled: dict[int, tuple[int, int]] = {}  # row, and what ``moves`` was

    def make(self, sock: socket.socket) -> None:
        """Make new texts until the engine has gone."""
        frames = FrameReader(Make)
        with contextlib.suppress(EOFError, OSError):
            while isinstance(asked := read_frame(sock, frames), Make):
                sock.sendall(encode(self._made(asked.text, asked.grammar)))

    def _made(self, text: int, grammar: Grammar) -> Made | NotMade:
        try:
            guide = self._maker.make(grammar, hurries=True)
        except InvalidRequest as refused:
            return NotMade(refused.message, refused.param)
        except Exception as error:
            return NotMade(f"{type(error).__name__}: {error}", fault=True)
        self._texts[text] = guide
        return Made(guide.says, tuple(guide.certain), guide.problem)

    def follow(self, sock: NumberSocket) -> None:
        """Follow texts until the engine has gone, which raises ``EOFError`` or ``OSError``."""
        sys.setswitchinterval(_SWITCH_S)
        while True:
            message = sock.receive()
            answers: list[int] = []
            changed: list[int] = []
            at = 0
            while at < len(message):
                what, text, count = message[at : at + 3]
                at += 3 + count
                if what == DROP:
                    for table in (self._texts, self._rows, self._filled):
                        table.pop(text, None)
                    continue
                changed.append(text)
                if what == TELL:
                    self._tell(text, message[at - count : at], answers)
                elif what == SEAT:
                    self._rows[text] = message[at - 1]
            sock.send(answers)
            for text in changed:
                self._fill(text)
            sock.send(())

    def _tell(self, text: int, token_ids: Sequence[int], answers: list[int]) -> None:
        """Follow a text; an answer where anything came of it that is not taken for granted."""
        guide = self._texts[text]
        says, expected = guide.says, list(guide.certain)[len(token_ids) :]
        guide.tell(token_ids)
        taken, took = guide.took()
        if took != "more" or guide.says != says or (guide.certain and list(guide.certain) != expected):
            standing = (OUTCOMES.index(took), PROBLEMS.index(guide.problem), guide.says, len(guide.certain))
            answers += (text, taken, *standing, *guide.certain)

    def _fill(self, text: int) -> None:
        """Make the mask of a text's next token, if it has a row and the row does not hold it yet."""
        row, guide = self._rows.get(text, NO_ROW), self._texts[text]
        state = (row, guide.moves)
        if row == NO_ROW or guide.says != BY_BITS or self._filled.get(text) == state:
            return
        guide.matcher.unsafe_compute_mask_ptr(self._address + row * self._row_bytes + 4, self._row_bytes - 4)
        self._filled[text] = state
        if (also := guide.complete()) is not None:
            self._words[row * self._row_words + 1 + also // 32] |= 1 << also % 32


if __name__ == "__main__":
    sys.exit(main())
