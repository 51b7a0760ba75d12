"""Logprobs as the two OpenAI-compatible routes tell them: token by token, as texts.

A token is a run of bytes and may end inside a character; its text then holds a replacement character, and the chat route's
``bytes`` says what it really is. With ``return_tokens_as_token_ids`` a token's text is "token_id:42" instead.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from minivllm.text.tokenizer import Tokenizer
from minivllm.types import RequestOutput, TokenLogprobs

LEAST = -9999.0  # JSON has no minus infinity


class CompletionLogprobs(msgspec.Struct, frozen=True, gc=False):
    """Of /v1/completions: lists with an item for each token."""

    text_offset: tuple[int, ...]  # characters of tokens before
    token_logprobs: tuple[float | None, ...]  # the first token of an echoed prompt has none
    tokens: tuple[str, ...]
    top_logprobs: tuple[dict[str, float] | None, ...]  # the likeliest, and the chosen one


class PromptLogprob(msgspec.Struct, frozen=True, gc=False):
    """One token of a prompt, or one that could have stood in its place."""

    logprob: float
    rank: int
    decoded_token: str


OfPrompt = tuple[dict[int, PromptLogprob] | None, ...]  # of each token: itself, and the likeliest in its place, by their ids


class TopLogprob(msgspec.Struct, frozen=True, gc=False):
    """One of the likeliest tokens."""

    token: str
    logprob: float
    bytes: tuple[int, ...]


class ChatLogprob(msgspec.Struct, frozen=True, gc=False):
    """One token of an answer."""

    token: str
    logprob: float
    bytes: tuple[int, ...]
    top_logprobs: tuple[TopLogprob, ...]


class ChatLogprobs(msgspec.Struct, frozen=True, gc=False):
    """Of /v1/chat/completions."""

    content: tuple[ChatLogprob, ...]


class Echoed(NamedTuple):
    """A prompt that its text begins with."""

    ids: Sequence[int]
    found: Sequence[TokenLogprobs]  # of all ids but the first


class LogprobTexts:
    """Writes logprobs for one reply. Written by its route: it remembers how far each choice's text has come."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool) -> None:
        self._tokenizer, self._as_ids = tokenizer, as_ids
        self._offsets: dict[int, int] = {}  # by choice

    def completion(self, index: int, output: RequestOutput, echoed: "Echoed | None" = None) -> CompletionLogprobs | None:
        """Those of a choice's new tokens, behind its prompt's where that is ``echoed``; None: none were asked for."""
        if not output.logprobs and echoed is None:
            return None
        ids: Sequence[int] = output.token_ids
        every: Sequence[TokenLogprobs | None] = output.logprobs
        if echoed is not None:
            ids, every = (*echoed.ids, *ids), (None, *echoed.found, *every)
        tokens, offsets, at = [self._text(token) for token in ids], [], self._offsets.get(index, 0)
        for text in tokens:
            offsets.append(at)
            at += len(text)
        self._offsets[index] = at
        chosen = tuple(None if found is None else _finite(found.logprob) for found in every)
        tops = zip(tokens, every, strict=True)
        top = tuple(
            None if found is None else {**dict(self._top(found)), text: _finite(found.logprob)} for text, found in tops
        )
        return CompletionLogprobs(tuple(offsets), chosen, tuple(tokens), top)

    def of_prompt(self, ids: Sequence[int], every: Sequence[TokenLogprobs], num_top: int) -> OfPrompt:
        """Those of a prompt's tokens; the first has none."""
        return (None, *(self._with_likeliest(*one, num_top) for one in zip(ids[1:], every, strict=True)))

    def _with_likeliest(self, token: int, found: TokenLogprobs, num_top: int) -> dict[int, PromptLogprob]:
        likeliest = zip(found.top_ids[:num_top], found.top_logprobs, strict=False)
        places = {t: PromptLogprob(_finite(value), i, self._text(t)) for i, (t, value) in enumerate(likeliest, start=1)}
        return {token: PromptLogprob(_finite(found.logprob), found.rank, self._text(token)), **places}

    def chat(self, output: RequestOutput) -> ChatLogprobs | None:
        """The same for an answer."""
        if not output.logprobs:
            return None
        return ChatLogprobs(
            tuple(
                ChatLogprob(
                    self._text(token), _finite(found.logprob), self._bytes(token),
                    tuple(
                        TopLogprob(self._text(t), _finite(value), self._bytes(t))
                        for t, value in zip(found.top_ids, found.top_logprobs, strict=True)
                    ),
                )
                for token, found in zip(output.token_ids, output.logprobs, strict=True)
            )
        )  # fmt: skip

    def _top(self, found: TokenLogprobs) -> Iterable[tuple[str, float]]:
        """Texts and logprobs of the likeliest tokens; of tokens with one text the likeliest, which is written last."""
        pairs = zip(found.top_ids, found.top_logprobs, strict=True)
        return ((self._text(token), _finite(value)) for token, value in reversed(list(pairs)))

    def _text(self, token: int) -> str:
        return f"token_id:{token}" if self._as_ids else self._tokenizer.token_bytes(token).decode("utf-8", "replace")

    def _bytes(self, token: int) -> tuple[int, ...]:
        return tuple(self._tokenizer.token_bytes(token))


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
