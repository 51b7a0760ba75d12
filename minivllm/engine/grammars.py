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

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLTokenizer

from minivllm.scheduler.request import Took
from minivllm.text.grammar import matcher
from minivllm.types import Grammar

CACHE_BYTES = 64 * 2**20  # of grammars that are kept for later requests
_ALL = -1  # a word of a mask with every bit set
_NO_TOKEN = "No token is left that the grammar and the other wishes (allowed_token_ids, bad_words ...) both allow; drop one."
_TOO_COMPLEX = "The grammar became too complex to follow at this place of the text; simplify it."


class Guide:
    """Where one text stands in its grammar. Advanced by the scheduler, asked for masks by ``Grammars``: one thread."""

    def __init__(self, matcher: LLMatcher, vocabulary: LLTokenizer, begins_after: str, *, hurries: bool) -> None:
        """``hurries``: certain tokens need not be sampled (somebody who wants logprobs wants those of every token)."""
        self.problem = ""
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._hurries = hurries
        self._awaited = begins_after.encode()  # the text is free until these bytes have come
        self._tail = b""  # the end of the free text, one byte shorter than what is awaited
        self._certain: list[int] = []  # tokens that the matcher has taken and the request has not got yet
        if not self._awaited:
            self._look_ahead()

    @property
    def ahead(self) -> Sequence[int]:
        """See ``scheduler.request.Guide``."""
        return self._certain if self._hurries else ()

    def take(self, token_id: int) -> Took:
        """See ``scheduler.request.Guide``."""
        if self.problem:
            return "refused"
        if self._awaited:
            return self._wait(token_id)
        return self._went_on(self._certain.pop(0) == token_id if self._certain else self._matcher.consume_token(token_id))

    def _wait(self, token_id: int) -> Took:
        """The text is free; look for its end. Bytes behind that, in the same token, are the first that the grammar sees."""
        text = self._tail + self._vocabulary.decode_bytes([token_id])
        found = text.find(self._awaited)
        if found < 0:
            self._tail = text[-len(self._awaited) + 1 :] if len(self._awaited) > 1 else b""
            return "more"
        rest = text[found + len(self._awaited) :].lstrip()
        self._awaited = b""
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
        self._certain = list(self._matcher.compute_ff_tokens())
        if self._certain and not self._matcher.consume_tokens(self._certain):
            self.problem = _TOO_COMPLEX

    def check(self) -> None:
        """See whether the matcher gave up over a mask: then the next token ends the request."""
        if self._matcher.is_error():
            self.problem = _TOO_COMPLEX

    def known_mask(self, ahead: int, mask: npt.NDArray[np.int32]) -> LLMatcher | None:
        """Fill ``mask`` [words] for the token behind the next ``ahead`` certain ones; or the matcher that can."""
        if self.problem or self._awaited:
            mask[:] = _ALL
        elif ahead < len(self._certain):
            mask[:] = 0
            token = self._certain[ahead]
            mask.view(np.uint32)[token // 32] = np.uint32(1 << token % 32)
        else:
            return self._matcher
        return None


class Grammars:
    """Guides for requests, from a vocabulary that is made when the first grammar comes. Driven by the engine's thread."""

    def __init__(self, make_vocabulary: Callable[[], LLTokenizer], vocab_size: int, num_threads: int) -> None:
        """``vocab_size``: of the logits. ``num_threads``: how many compute masks at the same time."""
        self._make_vocabulary = make_vocabulary
        self._words = -(-vocab_size // 32)
        self._num_threads = num_threads
        self._made: OrderedDict[Grammar, LLMatcher] = OrderedDict()  # the latest used last
        self._bytes = 0
        self._vocabulary: LLTokenizer | None = None
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._executor: LLExecutor | None = None

    def prepare(self, grammar: Grammar, *, hurries: bool) -> "Future[Guide]":
        """A guide at the beginning of a text, soon. Its errors: ``InvalidRequest``, and what making a vocabulary raises."""
        return self._maker.submit(self._guide, grammar, hurries)

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
        return Guide(made.deep_copy(), self._vocabulary, grammar.begins_after, hurries=hurries)

    def masks(self, guided: Sequence[tuple[Guide, int] | None]) -> npt.NDArray[np.int32]:
        """One mask [words of 32 tokens] for each: of the token behind a number of certain ones. None: any token may come."""
        wide = self._words if self._vocabulary is None else max(self._words, -(-self._vocabulary.vocab_size // 32))
        masks = np.full((len(guided), wide), _ALL, dtype=np.int32)
        asked: list[tuple[LLMatcher, int]] = []
        guides: list[Guide] = []
        for place, entry in enumerate(guided):
            if entry is not None and (matcher := entry[0].known_mask(entry[1], masks[place])) is not None:
                asked.append((matcher, place))
                guides.append(entry[0])
        if asked:
            self._executor = self._executor or LLExecutor(self._num_threads)
            self._executor.unsafe_compute_mask_ptr(asked, masks.ctypes.data, wide * 4, len(masks))
            for guide in guides:
                guide.check()
        return masks if wide == self._words else np.ascontiguousarray(masks[:, : self._words])


def cost_bytes(grammar: Grammar) -> int:
    """About what a matcher of this grammar holds. Measured: docs/structured.md."""
    return 2**16 + 40 * len(grammar.source)
