"""A text and its grammar: where it stands, which tokens may come next, and which must.

A ``Guide`` goes with one request and is a function of the tokens that it was told. ``FollowedText`` is what the scheduler and
``grammars.py`` see of one, wherever it lives: in this process (``Guide``) or in another (``guide_pool.py``).

Where a grammar leaves no choice (``{"name":"`` of compact JSON) the tokens are *certain*: no step samples them. They are put
behind the known tokens and computed like a piece of a prompt, so a text has them sooner (llguidance: fast-forward). Which
tokens spell the certain bytes is fixed the moment they become certain, and a step that samples one of them anyway (it was
planned before that was known) is given a mask with that token alone: overlapped steps and steps one by one so give one text.
"""

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from itertools import islice, takewhile
from typing import Final

from llguidance import LLMatcher, LLTokenizer

from minivllm.scheduler.request import Took
from minivllm.text.grammar import matcher
from minivllm.types import ANY_TOKEN, BY_BITS, GUIDE_FAULT, Grammar

CACHE_BYTES: Final = 128 * 2**20  # of grammars that are kept for later requests
NO_ROW: Final = -1
MOST_CERTAIN: Final = 1024  # tokens that are settled at a time
NO_TOKEN: Final = (
    "No token is left that the grammar and the other wishes (allowed_token_ids, bad_words ...) both allow; drop one."
)
TOO_COMPLEX: Final = "The grammar became too complex to follow at this place of the text; simplify it."

log = logging.getLogger("minivllm")


class FollowedText:
    """Where a text stands. Written by what follows it; told tokens by the scheduler, asked for masks by ``Grammars``."""

    def __init__(self, *, hurries: bool) -> None:
        """``hurries``: tokens that are certain need not be sampled."""
        self.problem = ""
        self.says = ANY_TOKEN  # what the first word of its mask says behind the certain tokens
        self.certain: deque[int] = deque()  # tokens that the matcher has taken and the request has not got yet
        self.row = NO_ROW  # where its masks are made
        self._taken: tuple[int, Took] = (0, "more")
        self._hurries = hurries

    def ahead(self, skip: int, most: int) -> tuple[int, ...]:
        """See ``scheduler.request.Guide``."""
        return tuple(islice(self.certain, skip, skip + most)) if self._hurries and self.certain else ()

    def sit(self, row: int) -> None:
        """Its masks belong into this row, or nowhere (``NO_ROW``)."""
        self.row = row

    def mask_says(self, ahead: int) -> int:
        """What the first word of its mask says for the token behind the next ``ahead`` certain ones."""
        return self.certain[ahead] if ahead < len(self.certain) else self.says


class Guide(FollowedText):
    """One that is followed in this process. Written by one thread.

    A text may be free at first: until the reasoning ends, or until the model begins a call. Whether it reasons at all may be
    the model's choice too. Then its first token decides: the *opener* (``<think>``), or what the grammar begins with.
    """

    def __init__(
        self, matcher: LLMatcher, vocabulary: LLTokenizer, grammar: Grammar, vocab_size: int, *, hurries: bool
    ) -> None:
        """``vocab_size``: of the logits; tokenizers may have more."""
        super().__init__(hurries=hurries)
        self.moves = 0  # how often the matcher went on: its mask is another
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._awaited = deque(text.encode() for text in grammar.begins_after)  # the text is free until these have come
        self._keeps_last = grammar.keeps_last
        self._opener: deque[int] = deque(grammar.opener_ids)  # what may still come of it
        self._opened = False  # its first token has come
        self._tail = b""  # the end of the free text, one byte shorter than what is awaited
        if not self._awaited:
            self._look_ahead()
        self.says = self._standing()

    def tell(self, token_ids: Sequence[int]) -> None:
        """See ``scheduler.request.Guide``."""
        taken, took = 0, "more"
        for token_id in token_ids:
            took = self.take(token_id)
            taken += took != "refused"
            if took != "more":
                break
        self._taken = taken, took  # type: ignore[assignment]

    def took(self) -> tuple[int, Took]:
        """See ``scheduler.request.Guide``."""
        return self._taken

    def take(self, token_id: int) -> Took:
        """The text goes on with this token. Raises nothing: a fault in following one text is not the others'."""
        try:
            took = "refused" if self.problem else self._take(token_id)
            self.says = self._standing()
            return took
        except BaseException as error:
            self._failed(error)
            return "refused"

    def _failed(self, error: BaseException) -> None:
        """Following this text failed; its next token ends it. Raises what is no fault."""
        if not is_fault(error):
            raise error
        log.error("a text cannot be followed any further", exc_info=error)
        self.problem, self.says = GUIDE_FAULT, ANY_TOKEN

    def _standing(self) -> int:
        """See ``says``."""
        if self.problem or len(self._awaited) > bool(self._opener):
            return ANY_TOKEN
        return self._opener[0] if self._opened and self._opener else BY_BITS

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
        if self.certain:
            return self._went_on(self.certain.popleft() == token_id)
        self.moves += 1
        return self._went_on(self._matcher.consume_token(token_id))

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
        self.moves += 1
        return self._went_on(self._matcher.try_consume_tokens(tokens) == len(tokens))

    def _went_on(self, taken: bool) -> Took:
        """The matcher took a token, or did not."""
        if taken and not self.certain:
            self._look_ahead()
        if not taken or self._matcher.is_error():
            self.problem = self.problem or NO_TOKEN
            return "refused"
        return "complete" if not self.certain and self._matcher.is_stopped() else "more"

    def _look_ahead(self) -> None:
        """Settle the tokens that are certain now."""
        certain = self._matcher.compute_ff_tokens()
        if not certain:
            return
        self.certain.extend(takewhile(self._vocab_size.__gt__, certain[:MOST_CERTAIN]))
        if self.certain:
            self.moves += 1
            if not self._matcher.consume_tokens(list(self.certain)):
                self.problem = TOO_COMPLEX

    @property
    def matcher(self) -> LLMatcher:
        """Who fills the mask where that goes by bits; ``complete`` has the last word."""
        return self._matcher

    def complete(self) -> int | None:
        """The matcher has filled a mask, or gave up over it: then the next token ends the request. Returns a token that may
        come too."""
        try:
            if self._matcher.is_error():
                self.problem, self.says = TOO_COMPLEX, ANY_TOKEN
        except BaseException as error:
            self._failed(error)
        return self._opener[0] if self._opener else None


def is_fault(error: BaseException) -> bool:
    """True for what may be caught: a panic of llguidance is no ``Exception``."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


class GuideMaker:
    """Guides at the beginning of texts, from a vocabulary that is made when the first is asked for. Written by one thread."""

    def __init__(self, make_vocabulary: Callable[[], LLTokenizer], vocab_size: int) -> None:
        """``vocab_size``: of the logits."""
        self._make_vocabulary = make_vocabulary
        self._vocab_size = vocab_size
        self._made: OrderedDict[Grammar, LLMatcher] = OrderedDict()  # the latest used last
        self._bytes = 0
        self._vocabulary: LLTokenizer | None = None

    @property
    def row_words(self) -> int:
        """Of a mask and what it says before. Known when a guide was made."""
        return 1 + -(-max(self._vocab_size, 0 if self._vocabulary is None else self._vocabulary.vocab_size) // 32)

    def make(self, grammar: Grammar, *, hurries: bool) -> Guide:
        """Raises ``InvalidRequest``, and what making a vocabulary raises."""
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


def cost_bytes(grammar: Grammar) -> int:
    """About what a matcher of this grammar holds once texts have followed it. Measured: docs/structured.md."""
    return 3 * 2**16 + 64 * len(grammar.source)
