"""Guides in processes of their own: a step's texts are followed, and their masks made, by many cores at once.

llguidance holds Python's lock for most of what it does, so threads wait for each other and the engine's loop for all of them.
A *worker* is a process that follows some of the texts. In each step:

1. The step's tokens are there: every worker is sent those of its texts, follows them, settles what is certain and answers.
   The scheduler needs that answer; few texts have anything to say, and the others are not in it.
2. Unasked, the worker computes the masks of the tokens behind, into memory that all processes share, each at its text's row.
   It says when it is done. Meanwhile the engine ends what has ended and plans the next step.

A worker that is lost costs its texts, which end with an error, and is replaced. Workers are forked by a *nursery*, a process
that has read the vocabulary: so they share its memory, and begin at once. They die with it, and it with the engine
(``child.py``).
Texts are the same to the token, whoever follows them (``tests/test_grammars.py``).
"""

import itertools
import logging
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from minivllm.child import READ_BYTES, FrameReader, encode
from minivllm.engine.guide import NO_TOKEN, TOO_COMPLEX, FollowedText
from minivllm.engine.numbers import NumberSocket
from minivllm.errors import InvalidRequest
from minivllm.scheduler.request import Took
from minivllm.text.helper import Words
from minivllm.types import GUIDE_FAULT, Grammar

PROGRAM: Final = ("-m", "minivllm.engine.guide_process")
TELL, SEAT, DROP = 0, 1, 2  # what a worker is sent of a text: its tokens, the row that it has, that it has ended
OUTCOMES: Final[tuple[Took, ...]] = ("more", "complete", "refused")
PROBLEMS: Final = ("", NO_TOKEN, GUIDE_FAULT, TOO_COMPLEX)
ANSWER_WORDS: Final = (
    6  # of a text: id, tokens taken, outcome, problem, what its mask says, number of certain tokens; then these
)
LOST_S: Final = 10.0  # a worker that says nothing for so long is given up
START_S: Final = 60.0
SPIN_S: Final = 0.003  # a worker that hears nothing for so long goes to sleep: longer than a short step takes

log = logging.getLogger("minivllm")


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """First word to the nursery."""

    words: Words
    vocab_size: int  # of the logits
    rows: int
    row_words: int  # of a row of masks
    spin_s: float


class Make(msgspec.Struct, frozen=True, tag="make"):
    """A new text for a worker."""

    text: int
    grammar: Grammar


class Made(msgspec.Struct, frozen=True, tag="made"):
    """It can be followed; how it begins, or with what problem. The nursery says so too when it is ready."""

    says: int = 0
    certain: tuple[int, ...] = ()
    problem: str = ""


class NotMade(msgspec.Struct, frozen=True, tag="not made"):
    """It cannot. ``fault``: it is not the request's fault."""

    message: str
    param: str | None = None
    fault: bool = False


Reply = Made | NotMade


class RemoteGuide(FollowedText):
    """A text that a worker follows. Written by the engine's thread."""

    def __init__(self, text: int, worker: "Worker", made: Made, *, hurries: bool) -> None:
        super().__init__(hurries=hurries)
        self.says, self.problem = made.says, made.problem
        self.certain.extend(made.certain)
        self.text, self._worker = text, worker
        worker.texts[text] = self

    def __del__(self) -> None:
        self._worker.dropped.append(self.text)

    def tell(self, token_ids: Sequence[int]) -> None:
        """See ``scheduler.request.Guide``. What nearly every token leads to is taken for granted; an answer says otherwise."""
        count = len(token_ids)
        self._taken = count, "more"
        self._worker.outbox += (TELL, self.text, count, *token_ids)
        self._worker.owes_answer = True
        if self.certain:
            for _ in range(min(count, len(self.certain))):
                self.certain.popleft()

    def took(self) -> tuple[int, Took]:
        """See ``scheduler.request.Guide``."""
        if self._worker.owes_answer:
            self._worker.pool.gather()
        return (0, "refused") if self.problem is GUIDE_FAULT else self._taken

    def answer(self, taken: int, outcome: int, problem: int, says: int, certain: Sequence[int]) -> None:
        """What came of what it was told."""
        self._taken = taken, OUTCOMES[outcome]
        self.problem, self.says, self.certain = PROBLEMS[problem], says, deque(certain)

    def sit(self, row: int) -> None:
        """Its masks belong into this row, or nowhere (``NO_ROW``)."""
        super().sit(row)
        self._worker.outbox += (SEAT, self.text, 1, row)

    def lose(self) -> None:
        """Nobody follows it any more."""
        self.problem, self.certain = GUIDE_FAULT, deque()


class Worker:
    """A process that follows texts, as seen from the engine. Written by its pool."""

    def __init__(self, pool: "GuidePool", steps: socket.socket, makes: socket.socket, spin_s: float) -> None:
        self.pool: GuidePool = weakref.proxy(pool)  # which ends when the engine lets it go
        self.texts: weakref.WeakValueDictionary[int, RemoteGuide] = weakref.WeakValueDictionary()
        self.dropped: deque[int] = deque()  # filled by whichever thread lets a text go
        self.outbox: list[int] = []  # the next message: texts add what they have to say
        self.owes_answer = False  # to tokens in the next message, or in the one that was sent
        self.making = 0  # texts that begin now; written under the pool's lock
        self.broken = False  # a maker noticed that it has gone
        self._steps = NumberSocket(steps, spin_s)
        self._makes, self._frames = makes, FrameReader(Reply)  # type: ignore[arg-type]
        self._turn = threading.Lock()  # of makers
        self._due = 0  # messages that will come: an answer and a "done" for each that was sent

    def send(self) -> None:
        """Send what was posted; what is for a worker that has gone goes nowhere."""
        while self.dropped:
            self.outbox += (DROP, self.dropped.popleft(), 0)
        if self.outbox:
            self.finish()
            try:
                self._steps.send(self.outbox)
                self._due = 2
            except OSError:
                self.lose()
        self.outbox = []

    def read_answer(self) -> None:
        """Wait for the answer to what was sent."""
        self.owes_answer = False
        if self._due < 2:
            return
        found = self._receive()
        at = 0
        while at < len(found):
            text, taken, outcome, problem, says, count = found[at : at + ANSWER_WORDS]
            at += ANSWER_WORDS + count
            if (guide := self.texts.get(text)) is not None:
                guide.answer(taken, outcome, problem, says, found[at - count : at])

    def finish(self) -> None:
        """Wait until the masks are made."""
        if self._due == 2:
            self.read_answer()
        if self._due:
            self._receive()

    def _receive(self) -> Sequence[int]:
        try:
            found = self._steps.receive(LOST_S)
        except (EOFError, TimeoutError):
            self.lose()
            return ()
        self._due -= 1
        return found

    def lose(self) -> None:
        """It has gone, and its texts with it; another takes its place."""
        log.error("a process that followed grammars was lost; the %d texts that it followed end", len(self.texts))
        self.broken, self.owes_answer, self._due = True, False, 0
        self._steps.close()
        for guide in list(self.texts.values()):
            guide.lose()
        self.pool.replace(self)

    def make(self, text: int, grammar: Grammar) -> Made:
        """A new text; called by any thread. Raises ``InvalidRequest``, ``RuntimeError``."""
        with self._turn:
            try:
                self._makes.sendall(encode(Make(text, grammar)))
                reply = read_frame(self._makes, self._frames)
            except (OSError, EOFError) as error:
                self.broken = True
                raise RuntimeError("a process that follows grammars was lost while it made one") from error
        if isinstance(reply, NotMade):
            raise RuntimeError(reply.message) if reply.fault else InvalidRequest(reply.message, reply.param)
        if not isinstance(reply, Made):
            raise RuntimeError("a process that follows grammars spoke out of turn")
        return reply


class GuidePool:
    """The workers. Driven by the engine's thread, but for ``make``."""

    def __init__(self, words: Words, vocab_size: int, rows: int, num_workers: int, spin_s: float = SPIN_S) -> None:
        """Starts all; takes as long as reading the vocabulary does. ``rows`` of masks. Raises ``OSError``, ``RuntimeError``."""
        row_words = 1 + -(-max(vocab_size, words.vocab_size) // 32)
        shared = os.memfd_create("masks")
        os.ftruncate(shared, rows * row_words * 4)
        memory = mmap.mmap(shared, 0)
        self.masks: npt.NDArray[np.int32] = np.frombuffer(memory, np.int32).reshape(rows, row_words)
        self._numbers, self._choosing = itertools.count(), threading.Lock()
        self._spin_s = spin_s
        self._control, theirs = socket.socketpair()
        descriptors = (theirs.fileno(), shared)
        command = [sys.executable, *PROGRAM, *map(str, descriptors)]
        self._nursery = subprocess.Popen(command, pass_fds=descriptors, stdin=subprocess.DEVNULL)
        weakref.finalize(self, _end, self._nursery, self._control)
        theirs.close()
        os.close(shared)
        self._control.settimeout(START_S)
        try:
            self._control.sendall(encode(Begin(words, vocab_size, rows, row_words, spin_s)))
            read_frame(self._control, FrameReader(Reply))  # type: ignore[arg-type]
        except EOFError as error:
            raise RuntimeError("the process that should follow grammars ended") from error
        self.workers = [self._spawn() for _ in range(num_workers)]

    def _spawn(self) -> Worker:
        (steps, its_steps), (makes, its_makes) = socket.socketpair(), socket.socketpair()
        socket.send_fds(self._control, [b"w"], [its_steps.fileno(), its_makes.fileno()])
        its_steps.close()
        its_makes.close()
        return Worker(self, steps, makes, self._spin_s)

    def mend(self) -> int:
        """Replace workers that makers found broken; how many can be given texts."""
        for worker in [worker for worker in self.workers if worker.broken]:
            worker.lose()
        return len(self.workers)

    def replace(self, lost: Worker) -> None:
        """Another worker for one that was lost, if there can be one."""
        self.workers = [worker for worker in self.workers if worker is not lost]
        try:
            self.workers.append(self._spawn())
        except OSError:
            log.error("no further process that follows grammars can be started; %d are left", len(self.workers))

    def make(self, grammar: Grammar, *, hurries: bool) -> RemoteGuide:
        """A text at its beginning; called by any thread. Raises ``InvalidRequest``, ``RuntimeError``."""
        with self._choosing:
            worker = min((w for w in self.workers if not w.broken), key=lambda one: len(one.texts) + one.making)
            worker.making += 1
        text = next(self._numbers)
        try:
            return RemoteGuide(text, worker, worker.make(text, grammar), hurries=hurries)
        finally:
            with self._choosing:
                worker.making -= 1

    def gather(self) -> None:
        """Send every worker what was posted, and read the answers of those who owe one."""
        for worker in list(self.workers):
            worker.send()
        for worker in list(self.workers):
            if worker.owes_answer:
                worker.read_answer()

    def finish(self) -> None:
        """Wait until all masks are made."""
        for worker in list(self.workers):
            worker.send()
        for worker in list(self.workers):
            worker.finish()


def read_frame(sock: socket.socket, frames: FrameReader) -> object:
    """The next message of a socket that brings one at a time. Raises ``EOFError``, ``OSError``."""
    while True:
        if not (data := sock.recv(READ_BYTES)):
            raise EOFError
        if messages := frames.feed(data):
            return messages[0]


def _end(nursery: "subprocess.Popen[bytes]", control: socket.socket) -> None:
    """Workers die with the nursery."""
    control.close()
    nursery.send_signal(signal.SIGKILL)
    nursery.wait()
