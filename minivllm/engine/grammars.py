"""Texts that follow a grammar: where each one stands, and the masks that the next tokens are drawn under.

A ``Guide`` goes with one request. The scheduler tells it every token that it keeps; the engine asks all guides of a step for
their masks at once, while the device computes the step's body. A guide is a function of the tokens it was told, so a request
that is preempted, fails or starts over loses nothing.

Where a grammar leaves no choice (``{"name":"`` of compact JSON) the tokens are *certain*: no step samples them. They are put
behind the known tokens and computed like a piece of a prompt, so a text has them sooner (llguidance: fast-forward). Which
tokens spell the certain bytes is fixed the moment they become certain, and a step that samples one of them anyway (it was
planned before that was known) is given a mask with a single bit: overlapped steps and steps one by one so give one text.

Making a matcher of a long schema can take some hundred milliseconds, so a thread does it while steps go on, and what was made
is kept for the next request with that grammar, within a bound of bytes.
"""

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice, takewhile

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLTokenizer

from minivllm.scheduler.request import Took
from minivllm.text.grammar import matcher
from minivllm.types import GUIDE_FAULT, Grammar

CACHE_BYTES = 64 * 2**20  # of grammars that are kept for later requests
MOST_CERTAIN = 1024  # tokens that are settled at a time
_ALL = -1  # a word of a mask with every bit set
_NO_TOKEN = "No token is left that the grammar and the other wishes (allowed_token_ids, bad_words ...) both allow; drop one."
_TOO_COMPLEX = "The grammar became too complex to follow at this place of the text; simplify it."

log = logging.getLogger("minivllm")


class Guide:
    """Where one text stands in its grammar. Advanced by the scheduler, asked for masks by ``Grammars``: one thread.

    A text may be free at first: until the reasoning ends, or until the model begins a call. Whether it reasons at all may be
    the model's choice too. Then its first token decides: the *opener* (``<think>``), or what the grammar begins with.
    """

    def __init__(
        self, matcher: LLMatcher, vocabulary: LLTokenizer, grammar: Grammar, vocab_size: int, *, hurries: bool
    ) -> None:
        """``vocab_size``: of the logits; tokenizers may have more. ``hurries``: tokens that are certain need not be sampled."""
        self.problem = ""
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._hurries = hurries
        self._vocab_size = vocab_size
        self._awaited = deque(text.encode() for text in grammar.begins_after)  # the text is free until these have come
        self._keeps_last = grammar.keeps_last
        self._opener: deque[int] = deque(grammar.opener_ids)  # what may still come of it
        self._opened = False  # its first token has come
        self._tail = b""  # the end of the free text, one byte shorter than what is awaited
        self._certain: deque[int] = deque()  # tokens that the matcher has taken and the request has not got yet
        if not self._awaited:
            self._look_ahead()

    def ahead(self, skip: int, most: int) -> tuple[int, ...]:
        """See ``scheduler.request.Guide``."""
        return tuple(islice(self._certain, skip, skip + most)) if self._hurries else ()

    def take(self, token_id: int) -> Took:
        """See ``scheduler.request.Guide``. Raises nothing: a fault in following one text is not the others'."""
        try:
            return "refused" if self.problem else self._take(token_id)
        except BaseException as error:
            self._failed(error)
            return "refused"

    def _failed(self, error: BaseException) -> None:
        """Following this text failed; its next token ends it. Raises what is no fault."""
        if not is_fault(error):
            raise error
        log.error("a text cannot be followed any further", exc_info=error)
        self.problem = GUIDE_FAULT

    def _take(self, token_id: int) -> Took:
        if self._opener:
            if token_id == self._opener[0]:
                self._opener.popleft()
                self._opened = True
                return "more"
            self._opener.clear()
            if not self._opened:
                self._awaited.popleft()
        if self._awaited:
            return self._wait(token_id)
        return self._went_on(self._certain.popleft() == token_id if self._certain else self._matcher.consume_token(token_id))

    def _wait(self, token_id: int) -> Took:
        """The text is free; look for its end. Bytes behind that, in the same token, are the first that the grammar sees."""
        text = self._tail + self._vocabulary.decode_bytes([token_id])
        while self._awaited:
            awaited = self._awaited[0]
            found = text.find(awaited)
            if found < 0:
                self._tail = text[-len(awaited) + 1 :] if len(awaited) > 1 else b""
                return "more"
            self._awaited.popleft()
            kept = self._keeps_last and not self._awaited
            text = text[found if kept else found + len(awaited) :]
        rest = text if self._keeps_last else text.lstrip()
        tokens = self._vocabulary.tokenize_bytes(rest) if rest else []
        return self._went_on(self._matcher.try_consume_tokens(tokens) == len(tokens))

    def _went_on(self, taken: bool) -> Took:
        """The matcher took a token, or did not."""
        if taken and not self._certain:
            self._look_ahead()
        if not taken or self._matcher.is_error():
            self.problem = self.problem or _NO_TOKEN
            return "refused"
        return "complete" if not self._certain and self._matcher.is_stopped() else "more"

    def _look_ahead(self) -> None:
        """Settle the tokens that are certain now."""
        certain = list(takewhile(self._vocab_size.__gt__, self._matcher.compute_ff_tokens()[:MOST_CERTAIN]))
        self._certain = deque(certain)
        if certain and not self._matcher.consume_tokens(certain):
            self.problem = _TOO_COMPLEX

    def known_mask(self, ahead: int, mask: npt.NDArray[np.int32]) -> LLMatcher | None:
        """Fill ``mask`` [words] for the token behind the next ``ahead`` certain ones; or the matcher that can (``complete`` has
        the last word). A fault in it is this text's alone."""
        try:
            return self._known_mask(ahead, mask)
        except BaseException as error:
            self._failed(error)
            mask[:] = _ALL
            return None

    def _known_mask(self, ahead: int, mask: npt.NDArray[np.int32]) -> LLMatcher | None:
        if self.problem or len(self._awaited) > bool(self._opener):
            mask[:] = _ALL
        elif self._opened and self._opener:
            mask[:] = 0
            _allow(mask, self._opener[0])
        elif ahead < len(self._certain):
            mask[:] = 0
            _allow(mask, self._certain[ahead])
        else:
            return self._matcher
        return None

    def complete(self, mask: npt.NDArray[np.int32]) -> None:
        """The matcher has filled its mask, or gave up over it: then the next token ends the request."""
        try:
            if self._matcher.is_error():
                self.problem = _TOO_COMPLEX
            elif self._opener:
                _allow(mask, self._opener[0])
        except BaseException as error:
            self._failed(error)


def is_fault(error: BaseException) -> bool:
    """True for what may be caught: a panic of llguidance is no ``Exception``."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _allow(mask: npt.NDArray[np.int32], token_id: int) -> None:
    """Set a token's bit."""
    mask.view(np.uint32)[token_id // 32] |= np.uint32(1 << token_id % 32)


class Grammars:
    """Guides for requests, from a vocabulary that is made when the first grammar comes. Driven by the engine's thread."""

    def __init__(self, make_vocabulary: Callable[[], LLTokenizer], vocab_size: int, num_threads: int) -> None:
        """``vocab_size``: of the logits. ``num_threads``: how many compute masks at the same time."""
        self._make_vocabulary = make_vocabulary
        self._vocab_size = vocab_size
        self._words = -(-vocab_size // 32)
        self._num_threads = num_threads
        self._made: OrderedDict[Grammar, LLMatcher] = OrderedDict()  # the latest used last
        self._bytes = 0
        self._vocabulary: LLTokenizer | None = None
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._executor: LLExecutor | None = None

    def prepare(self, grammar: Grammar, *, hurries: bool) -> "Future[Guide]":
        """A guide at the beginning of a text, soon. Its errors: ``InvalidRequest``, and what making a vocabulary raises."""
        return self._maker.submit(self._made_guide, grammar, hurries)

    def _made_guide(self, grammar: Grammar, hurries: bool) -> Guide:
        try:
            return self._guide(grammar, hurries)
        except BaseException as error:
            if isinstance(error, Exception) or not is_fault(error):
                raise
            raise RuntimeError("a guide could not be made") from error

    def _guide(self, grammar: Grammar, hurries: bool) -> Guide:
        """Runs in the maker's only thread, which is the one that writes the cache."""
        if self._vocabulary is None:
            self._vocabulary = self._make_vocabulary()
        key = Grammar(grammar.kind, grammar.source, grammar.compact)
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = matcher(key, self._vocabulary)
            self._bytes += cost_bytes(key)
            while self._bytes > CACHE_BYTES:
                self._bytes -= cost_bytes(self._made.popitem(last=False)[0])
        elif next(reversed(self._made)) != key:
            self._made.move_to_end(key)
        return Guide(made.deep_copy(), self._vocabulary, grammar, self._vocab_size, hurries=hurries)

    def masks(self, guided: Sequence[tuple[Guide, int] | None]) -> npt.NDArray[np.int32]:
        """One mask [words of 32 tokens] for each: of the token behind a number of certain ones. None: any token may come."""
        wide = self._words if self._vocabulary is None else max(self._words, -(-self._vocabulary.vocab_size // 32))
        masks = np.full((len(guided), wide), _ALL, dtype=np.int32)
        asked: list[tuple[LLMatcher, int]] = []
        guides: list[tuple[Guide, int]] = []
        for place, entry in enumerate(guided):
            if entry is not None and (matcher := entry[0].known_mask(entry[1], masks[place])) is not None:
                asked.append((matcher, place))
                guides.append((entry[0], place))
        if asked:
            self._executor = self._executor or LLExecutor(self._num_threads)
            try:
                self._executor.unsafe_compute_mask_ptr(asked, masks.ctypes.data, wide * 4, len(masks))
            except BaseException as error:
                raise (RuntimeError("the masks of a step could not be computed") if is_fault(error) else error) from error
            for guide, place in guides:
                guide.complete(masks[place])
        return masks if wide == self._words else np.ascontiguousarray(masks[:, : self._words])


def cost_bytes(grammar: Grammar) -> int:
    """About what a matcher of this grammar holds. Measured: docs/structured.md."""
    return 2**16 + 40 * len(grammar.source)
