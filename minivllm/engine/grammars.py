"""Texts that follow a grammar: who follows each one, and the masks that the next tokens are drawn under.

A guide (``guide.py``) goes with one request. The scheduler tells it every token that it keeps; the engine asks all guides of a
step for their masks at once, while the device computes the step's body. A guide is a function of the tokens it was told, so a
request that is preempted, fails or starts over loses nothing. Where there are cores for it, other processes follow the texts
(``guide_pool.py``); else this one does, and computes the masks with a few threads when they are asked for.

Making a matcher of a long schema can take some hundred milliseconds, so a thread does it while steps go on, and what was made
is kept for the next request with that grammar, within a bound of bytes.
"""

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLTokenizer

from minivllm.engine.guide import NO_ROW, Guide, GuideMaker, is_fault
from minivllm.engine.guide_pool import GuidePool, RemoteGuide
from minivllm.text.grammar import words_of
from minivllm.text.helper import Words
from minivllm.types import ANY_TOKEN, BY_BITS, Grammar

AnyGuide = Guide | RemoteGuide

log = logging.getLogger("minivllm")


@dataclass(frozen=True)
class GrammarSizes:
    """What grammars are followed for, and by how many."""

    vocab_size: int  # of the logits
    max_num_seqs: int  # rows of masks
    num_threads: int  # that compute masks in this process
    num_workers: int = 0  # processes that follow texts in its place


class Grammars:
    """Guides for requests, and masks by row. Driven by the engine's thread."""

    def __init__(self, make_words: Callable[[], Words], sizes: GrammarSizes) -> None:
        """``make_words``: the vocabulary, asked for when the first grammar comes."""
        self._make_words, self._sizes = make_words, sizes
        self._local = GuideMaker(partial(_vocabulary, make_words), sizes.vocab_size)
        self._pool: GuidePool | None = None
        self._may_start = sizes.num_workers > 0  # the pool was not started yet; under the lock
        self._turn = threading.Lock()  # of makers
        self._makers = ThreadPoolExecutor(max(1, sizes.num_workers), thread_name_prefix="grammar")
        self._executor: LLExecutor | None = None
        self._masks: npt.NDArray[np.int32] | None = None
        self._seated: list[Callable[[], AnyGuide | None]] = [_nobody] * sizes.max_num_seqs  # whose masks a row holds

    def prepare(self, grammar: Grammar, *, hurries: bool) -> "Future[AnyGuide]":
        """A guide at the beginning of a text, soon. Its errors: ``InvalidRequest``, and what making a vocabulary raises."""
        if self._pool is not None:
            self._pool.mend()
        return self._makers.submit(self._make, grammar, hurries)

    def _make(self, grammar: Grammar, hurries: bool) -> AnyGuide:
        """Runs in the makers' threads."""
        try:
            return self._made(grammar, hurries)
        except BaseException as error:
            if isinstance(error, Exception) or not is_fault(error):
                raise
            raise RuntimeError("a guide could not be made") from error

    def _made(self, grammar: Grammar, hurries: bool) -> AnyGuide:
        with self._turn:
            if self._may_start:
                self._may_start = False
                self._pool = self._start()
        if self._pool is not None and self._pool.workers:
            return self._pool.make(grammar, hurries=hurries)
        with self._turn:
            return self._local.make(grammar, hurries=hurries)

    def _start(self) -> GuidePool | None:
        sizes = self._sizes
        try:
            return GuidePool(self._make_words(), sizes.vocab_size, sizes.max_num_seqs, sizes.num_workers)
        except (OSError, RuntimeError):
            log.warning("No processes that follow grammars could be started; the engine follows them itself.", exc_info=True)
            return None

    def masks(self, rows: Sequence[int], guided: Sequence[tuple[AnyGuide, int] | None]) -> npt.NDArray[np.int32]:
        """Masks by row [max_num_seqs, 1 + words of 32 tokens] (``reference.rule_out``), of ``rows``: each guide's token behind
        a number of certain ones. None, and all other rows: any token may come. The array is the same at every call."""
        masks = self._masks if self._masks is not None else self._allocate()
        seated, says = self._seated, [ANY_TOKEN] * len(guided)
        local: list[tuple[Guide, int]] = []
        came: list[tuple[AnyGuide, int]] = []
        for place, entry in enumerate(guided):
            if entry is not None:
                guide, row = entry[0], rows[place]
                if seated[row]() is not guide:
                    came.append((guide, row))
                says[place] = guide.mask_says(entry[1]) if guide.certain else guide.says
                if says[place] == BY_BITS and isinstance(guide, Guide):
                    local.append((guide, row))
        if self._pool is not None:
            self._pool.finish()
        if came:
            self._seat(came)
        if local:
            self._compute(local, masks)
        masks[:, 0] = ANY_TOKEN
        masks[rows, 0] = says
        return masks

    def _allocate(self) -> npt.NDArray[np.int32]:
        """Memory for masks."""
        if self._pool is not None:
            self._masks = self._pool.masks
        else:
            self._masks = np.zeros((self._sizes.max_num_seqs, self._local.row_words), np.int32)
        return self._masks

    def _seat(self, came: Sequence[tuple[AnyGuide, int]]) -> None:
        """Texts have got these rows, and their masks are to be made there. Who had a row before is not about to write there any
        more, not even if it ended: all masks were finished."""
        for guide, row in came:
            if (before := self._seated[row]()) is not None:
                before.sit(NO_ROW)
            if guide.row != NO_ROW:
                self._seated[guide.row] = _nobody
            guide.sit(row)
            self._seated[row] = weakref.ref(guide)
        if self._pool is not None:
            self._pool.finish()

    def _compute(self, local: Sequence[tuple[Guide, int]], masks: npt.NDArray[np.int32]) -> None:
        """Make the masks of guides in this process, at their rows."""
        self._executor = self._executor or LLExecutor(self._sizes.num_threads)
        made = np.empty((len(local), masks.shape[1] - 1), np.int32)  # it writes masks without anything between them
        matchers = [(guide.matcher, place) for place, (guide, _) in enumerate(local)]
        try:
            self._executor.unsafe_compute_mask_ptr(matchers, made.ctypes.data, made.strides[0], len(made))
        except BaseException as error:
            raise (RuntimeError("the masks of a step could not be computed") if is_fault(error) else error) from error
        for (guide, row), mask in zip(local, made, strict=True):
            masks[row, 1:] = mask
            if (also := guide.complete()) is not None:
                masks[row].view(np.uint32)[1 + also // 32] |= np.uint32(1 << also % 32)


def _vocabulary(make_words: Callable[[], Words]) -> LLTokenizer:
    words = make_words()
    return words_of(words.tokenizer, words.vocab_size, words.eos_token_ids)


def _nobody() -> None:
    """Who sits on a row that nobody had yet."""
