"""Streaming text equals whole text, for any tokens, and no delta shows half a character."""

import functools
import random
import re
from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.errors import UnsupportedModel
from minivllm.text.detokenizer import Pieces
from minivllm.text.tokenizer import Tokenizer

TEXTS = ["", " ", "  two", "Once upon a time", "naïve café 你好 😀👍🏽\n\t end ", "<s>"]
TEXTS += ["\u0000\u007f\u0080\uffff\U0010ffff", "e\u0301"]


def stream(tokenizer: Tokenizer, ids: Sequence[int], prompt: Sequence[int] = (), skip: bool = True) -> list[str]:
    """The deltas, the last from finish()."""
    state = tokenizer.detokenizer(prompt, skip)
    return [state.add(i) for i in ids] + [state.finish()]


@functools.cache
def partial_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that are no whole characters. A tokenizer without byte fallback has none."""
    return tuple(i for i in range(tokenizer.vocab_size) if "\ufffd" in tokenizer.token_text(i))


def any_ids(tokenizer: Tokenizer, rng: random.Random, length: int) -> list[int]:
    """Random ids: special, unknown and partial ones more often than by chance."""
    odd = [*tokenizer.special_ids, tokenizer.vocab_size + 5, *partial_ids(tokenizer)]
    return [rng.choice(odd) if rng.random() < 0.5 else rng.randrange(tokenizer.vocab_size) for _ in range(length)]


def library_agrees(tokenizer: Tokenizer, ids: Sequence[int], skip: bool) -> bool:
    """False where the library replaces more than the wrong bytes: an invalid run of byte-fallback tokens."""
    run = b""
    for i in [*ids, None]:
        name = "" if i is None else tokenizer._backend.id_to_token(i) or ""
        if i is not None and (not name or (skip and i in tokenizer.special_ids)):
            continue
        if re.fullmatch("<0x[0-9A-F]{2}>", name):
            run += bytes((int(name[3:5], 16),))
            continue
        if len(run) > 1 and run.decode("utf-8", "replace").encode() != run:
            return False
        run = b""
    return True


@pytest.mark.parametrize("skip", [True, False])
def test_random_ids_stream_as_they_decode(tokenizer: Tokenizer, library: tokenizers.Tokenizer, skip: bool) -> None:
    rng = random.Random(1)
    compared = broken = 0
    for _ in range(300):
        ids = any_ids(tokenizer, rng, rng.choice((2, 4, 40)))
        whole = tokenizer.decode(ids, skip)
        assert "".join(stream(tokenizer, ids, skip=skip)) == whole
        broken += "\ufffd" in whole
        if library_agrees(tokenizer, ids, skip):
            assert library.decode(ids, skip_special_tokens=skip) == whole
            compared += 1
    assert compared > 30
    assert bool(broken) == bool(partial_ids(tokenizer))  # they did occur


@pytest.mark.parametrize("text", TEXTS)
def test_real_text_streams_and_equals_the_library(tokenizer: Tokenizer, library: tokenizers.Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    for skip in (True, False):
        assert "".join(stream(tokenizer, ids, skip=skip)) == library.decode(ids, skip_special_tokens=skip)


def test_no_half_characters_in_valid_text(tokenizer: Tokenizer) -> None:
    """Every Unicode scalar value, in chunks: no delta holds a replacement character that the text does not."""
    values = [*range(0x20, 0xD800, 7), *range(0xE000, 0xFFFD), *range(0x10000, 0x110000, 97)]
    random.Random(2).shuffle(values)
    for begin in range(0, len(values), 4000):
        ids = tokenizer.encode("".join(map(chr, values[begin : begin + 4000])), add_special_tokens=False)
        if any(tokenizer.token_text(i) == "<unk>" for i in ids):
            pytest.fail("the tokenizer lost characters")
        deltas = stream(tokenizer, ids)
        assert not any("\ufffd" in d for d in deltas)
        assert "".join(deltas) == tokenizer.decode(ids)
        assert "" in deltas[:-1]  # characters were cut between tokens


@pytest.mark.parametrize("skip", [True, False])
def test_prompt_is_not_repeated_but_counts(tokenizer: Tokenizer, skip: bool) -> None:
    """Complete characters of the prompt + output == whole, wherever the prompt ends."""
    rng = random.Random(3)
    begun_in_prompt = 0
    ids_of_text = tokenizer.encode("Once 你好 😀👍🏽 é 世界 upon", add_special_tokens=True)
    for _ in range(200):
        ids = any_ids(tokenizer, rng, 12) if rng.random() < 0.5 else ids_of_text
        cut = rng.randrange(0, len(ids))
        output = "".join(stream(tokenizer, ids[cut:], ids[:cut], skip))
        shown = [i for i in ids if not (skip and i in tokenizer.special_ids)]
        if all(not tokenizer.token_bytes(i) for i in ids[cut:] if i in shown):
            assert output == ""
            continue
        state = tokenizer.detokenizer((), skip)
        prompt_text = "".join(state.add(i) for i in ids[:cut])  # complete characters only
        begun_in_prompt += bool(state.finish())
        whole = tokenizer.decode(ids, skip)
        assert prompt_text + output == whole
    assert bool(begun_in_prompt) == bool(partial_ids(tokenizer))


def test_prompt_only_gives_nothing(trained_tokenizer: Tokenizer) -> None:
    first = trained_tokenizer.encode("你", add_special_tokens=False)[0]
    assert trained_tokenizer.token_bytes(first)[:1] == b"\xe4"
    assert trained_tokenizer.detokenizer([first]).finish() == ""


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_bytes_in_any_cut(trained_tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Byte tokens in any order, valid or not: the deltas are the one decoding of all bytes."""
    raw = data.draw(st.one_of(st.binary(max_size=30), st.text(max_size=10).map(lambda t: t.encode("utf-8", "replace"))))
    table = {trained_tokenizer.token_bytes(i): i for i in range(trained_tokenizer.vocab_size)}
    ids, at = [], 0
    while at < len(raw):
        size = next(n for n in range(data.draw(st.integers(1, 4)), 0, -1) if raw[at : at + n] in table)
        ids.append(table[raw[at : at + size]])
        at += size
    deltas = stream(trained_tokenizer, ids)
    assert "".join(deltas) == raw.decode("utf-8", "replace")
    shown = len("".join(deltas[:-1]).encode())
    assert shown >= len(raw.decode("utf-8", "replace").encode()) - 3  # never more than one character is open


def test_every_token_has_the_bytes_the_library_shows(tokenizer: Tokenizer, library: tokenizers.Tokenizer) -> None:
    """Each token alone, after a letter so that nothing is stripped at the beginning."""
    letter = library.token_to_id("a")
    for i in range(tokenizer.vocab_size):
        assert "a" + tokenizer.token_text(i) == library.decode([letter, i], skip_special_tokens=False)


def test_unknown_decoders_are_refused() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    for decoder in (None, {"type": "WordPiece"}, {"type": "Sequence", "decoders": [{"type": "CTC"}]}):
        with pytest.raises(UnsupportedModel, match="decoder"):
            Pieces(backend, decoder, frozenset())
