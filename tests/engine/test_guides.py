"""Where a text stands in its grammar: free until something comes, held from then on."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from minivllm.engine import grammars as room
from minivllm.engine.grammars import Grammars, Guide
from minivllm.text.grammar import vocabulary
from minivllm.text.tokenizer import Tokenizer, load_tokenizer
from minivllm.types import Grammar

CALL = 'start: "<call>" /[a-z]{2}/ "</call>"'


@pytest.fixture(scope="module")
def tokenizer(bundled_model: Path) -> Tokenizer:
    return load_tokenizer(bundled_model)


@pytest.fixture
def grammars(tokenizer: Tokenizer) -> Grammars:
    words = vocabulary(tokenizer, tokenizer.vocab_size, [0])
    return Grammars(lambda: words, tokenizer.vocab_size, 1)


@pytest.fixture
def allowed(grammars: Grammars, tokenizer: Tokenizer) -> Callable[[Guide], set[int]]:
    """Which tokens a guide's mask lets through."""

    def find(guide: Guide) -> set[int]:
        mask = grammars.masks([(guide, 0)])[0]
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: tokenizer.vocab_size]
        return set(np.flatnonzero(bits).tolist())

    return find


def guide_of(grammars: Grammars, grammar: Grammar) -> Guide:
    return grammars.prepare(grammar, hurries=True).result(30)


def take(guide: Guide, tokenizer: Tokenizer, text: str) -> str:
    """What the guide says after the last token of a text."""
    said = ""
    for token in tokenizer.encode(text, False):
        assert said in ("", "more")
        said = guide.take(token)
    return said


def test_it_holds_from_the_start(
    grammars: Grammars, tokenizer: Tokenizer, allowed: Callable[[Guide], set[int]]
) -> None:
    guide = guide_of(grammars, Grammar("regex", "[0-9]{2}x"))
    assert {tokenizer.token_text(t)[0] for t in allowed(guide)} == set("0123456789")
    assert take(guide, tokenizer, "42") == "more"
    assert guide.ahead(0, 5) == tuple(tokenizer.encode("x", False)) and guide.ahead(1, 5) == guide.ahead(0, 0) == ()
    assert allowed(guide) == set(guide.ahead(0, 5))
    assert take(guide, tokenizer, "x") == "complete"
    other = guide_of(grammars, Grammar("regex", "[0-9]{2}x"))
    assert take(other, tokenizer, "y") == "refused" and "No token is left" in other.problem
    assert take(other, tokenizer, "4") == "refused", "and stays so"


@pytest.mark.parametrize("free", ["hm</think>", "a b <thin </thin </think>\n\n", "</think> "])
def test_it_holds_behind_the_reasoning(
    grammars: Grammars, tokenizer: Tokenizer, allowed: Callable[[Guide], set[int]], free: str
) -> None:
    guide = guide_of(grammars, Grammar("regex", "[0-9]{2}", begins_after=("</think>",)))
    tokens = tokenizer.encode(free, False)
    end = next(i for i in range(len(tokens)) if "</think>" in tokenizer.decode(tokens[: i + 1]))
    for token in tokens[: end + 1]:
        assert len(allowed(guide)) == tokenizer.vocab_size and guide.ahead(0, 9) == ()
        assert guide.take(token) == "more"
    assert {tokenizer.token_text(t)[0] for t in allowed(guide)} == set("0123456789")
    assert take(guide, tokenizer, "77") == "complete"


def test_the_first_token_decides_whether_it_reasons(
    grammars: Grammars, tokenizer: Tokenizer, allowed: Callable[[Guide], set[int]]
) -> None:
    opener = tuple(tokenizer.encode("The", False))[:1]
    grammar = Grammar("regex", "[0-9]{2}", begins_after=("#",), opener_ids=opener)
    at_once, reasons = guide_of(grammars, grammar), guide_of(grammars, grammar)
    digits = {t for t in range(tokenizer.vocab_size) if tokenizer.token_text(t)[:1] in set("0123456789")} & allowed(at_once)
    assert allowed(at_once) == digits | set(opener) and digits
    assert take(at_once, tokenizer, "42") == "complete"
    assert reasons.take(opener[0]) == "more"
    assert len(allowed(reasons)) == tokenizer.vocab_size, "free until the mark"
    assert take(reasons, tokenizer, " fox said 99 #") == "more"
    assert not set(opener) & allowed(reasons)
    assert take(reasons, tokenizer, "42") == "complete"


def test_free_until_a_call_begins(
    grammars: Grammars, tokenizer: Tokenizer, allowed: Callable[[Guide], set[int]]
) -> None:
    opener = tuple(tokenizer.encode("!", False))
    grammar = Grammar("lark", CALL, begins_after=("#", "<call>"), keeps_last=True, opener_ids=opener)
    for text in ("a < b <cal <call>", "!<call> is what I think of # so: <call>"):
        guide = guide_of(grammars, grammar)
        for token in tokenizer.encode(text, False):
            assert len(allowed(guide)) == tokenizer.vocab_size
            assert guide.take(token) == "more"
        assert {tokenizer.token_text(t)[0] for t in allowed(guide)} <= set("abcdefghijklmnopqrstuvwxyz")
        assert take(guide, tokenizer, "hi</call>") == "complete"


def test_masks_of_several_and_of_who_left(grammars: Grammars, tokenizer: Tokenizer) -> None:
    guide = guide_of(grammars, Grammar("regex", "[a-c]x"))
    masks = grammars.masks([None, (guide, 0), None])
    assert masks.shape == (3, -(-tokenizer.vocab_size // 32))
    assert (masks[[0, 2]] == -1).all() and (masks[1] != -1).all()
    assert grammars.masks([None]).shape == masks[:1].shape


def test_what_was_made_is_kept_within_a_bound(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [Grammar("regex", f"[a-z]{{{n}}}") for n in range(1, 9)]
    monkeypatch.setattr(room, "CACHE_BYTES", room.cost_bytes(asked[0]) * 3 + 100)
    for grammar in (*asked[:3], asked[0], asked[3]):
        guide_of(grammars, grammar)
    assert list(grammars._made) == [asked[2], asked[0], asked[3]], "the one that was not asked for again is let go"
    assert grammars._bytes == sum(map(room.cost_bytes, grammars._made))
