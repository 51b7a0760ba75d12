"""Where a text stands in its grammar: free until something comes, held from then on."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from minivllm.engine import guide as room
from minivllm.engine.grammars import AnyGuide, Grammars, GrammarSizes
from minivllm.engine.guide import GuideMaker
from minivllm.text.grammar import vocabulary
from minivllm.text.helper import Words
from minivllm.text.tokenizer import Tokenizer, load_tokenizer
from minivllm.types import ANY_TOKEN, BY_BITS, Grammar

ROWS = 5
CALL = 'start: "<call>" /[a-z]{2}/ "</call>"'


@pytest.fixture(scope="module")
def tokenizer(bundled_model: Path) -> Tokenizer:
    return load_tokenizer(bundled_model)


@pytest.fixture(scope="module", params=[0, 2], ids=["here", "in workers"])
def grammars(tokenizer: Tokenizer, request: pytest.FixtureRequest) -> Grammars:
    words = Words(tokenizer.as_json(), tokenizer.vocab_size, tokenizer.known_ids([0]))
    return Grammars(lambda: words, GrammarSizes(tokenizer.vocab_size, ROWS, 1, request.param))


@pytest.fixture
def allowed(grammars: Grammars, tokenizer: Tokenizer) -> Callable[[AnyGuide], set[int]]:
    """Which tokens a guide's mask lets through."""

    def find(guide: AnyGuide) -> set[int]:
        says, *words = grammars.masks([3], [(guide, 0)])[3]
        bits = np.unpackbits(np.array(words).view(np.uint8), bitorder="little")[: tokenizer.vocab_size]
        every = {ANY_TOKEN: set(range(tokenizer.vocab_size)), BY_BITS: set(np.flatnonzero(bits).tolist())}
        return every.get(int(says), {int(says)})

    return find


def guide_of(grammars: Grammars, grammar: Grammar) -> AnyGuide:
    return grammars.prepare(grammar, hurries=True).result(30)


def take_one(guide: AnyGuide, token: int) -> str:
    """What the guide says of a token."""
    guide.tell([token])
    taken, took = guide.took()
    assert taken == (took != "refused")
    return took


def take(guide: AnyGuide, tokenizer: Tokenizer, text: str) -> str:
    """What the guide says after the last token of a text."""
    said = ""
    for token in tokenizer.encode(text, False):
        assert said in ("", "more")
        said = take_one(guide, token)
    return said


def test_it_holds_from_the_start(grammars: Grammars, tokenizer: Tokenizer, allowed: Callable[[AnyGuide], set[int]]) -> None:
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
    grammars: Grammars, tokenizer: Tokenizer, allowed: Callable[[AnyGuide], set[int]], free: str
) -> None:
    guide = guide_of(grammars, Grammar("regex", "[0-9]{2}", begins_after=("</think>",)))
    tokens = tokenizer.encode(free, False)
    end = next(i for i in range(len(tokens)) if "</think>" in tokenizer.decode(tokens[: i + 1]))
    for token in tokens[: end + 1]:
        assert len(allowed(guide)) == tokenizer.vocab_size and guide.ahead(0, 9) == ()
        assert take_one(guide, token) == "more"
    assert {tokenizer.token_text(t)[0] for t in allowed(guide)} == set("0123456789")
    assert take(guide, tokenizer, "77") == "complete"


def test_the_first_token_decides_whether_it_reasons(
    grammars: Grammars, tokenizer: Tokenizer, allowed: Callable[[AnyGuide], set[int]]
) -> None:
    opener = tuple(tokenizer.encode("The", False))[:1]
    grammar = Grammar("regex", "[0-9]{2}", begins_after=("#",), opener_ids=opener)
    at_once, reasons = guide_of(grammars, grammar), guide_of(grammars, grammar)
    digits = {t for t in range(tokenizer.vocab_size) if tokenizer.token_text(t)[:1] in set("0123456789")} & allowed(at_once)
    assert allowed(at_once) == digits | set(opener) and digits
    assert take(at_once, tokenizer, "42") == "complete"
    assert take_one(reasons, opener[0]) == "more"
    assert len(allowed(reasons)) == tokenizer.vocab_size, "free until the mark"
    assert take(reasons, tokenizer, " fox said 99 #") == "more"
    assert not set(opener) & allowed(reasons)
    assert take(reasons, tokenizer, "42") == "complete"


def test_free_until_a_call_begins(grammars: Grammars, tokenizer: Tokenizer, allowed: Callable[[AnyGuide], set[int]]) -> None:
    opener = tuple(tokenizer.encode("!", False))
    grammar = Grammar("lark", CALL, begins_after=("#", "<call>"), keeps_last=True, opener_ids=opener)
    for text in ("a < b <cal <call>", "!<call> is what I think of # so: <call>"):
        guide = guide_of(grammars, grammar)
        for token in tokenizer.encode(text, False):
            assert len(allowed(guide)) == tokenizer.vocab_size
            assert take_one(guide, token) == "more"
        assert {tokenizer.token_text(t)[0] for t in allowed(guide)} <= set("abcdefghijklmnopqrstuvwxyz")
        assert take(guide, tokenizer, "hi</call>") == "complete"


def test_masks_of_several_and_of_who_left(grammars: Grammars, tokenizer: Tokenizer) -> None:
    guide = guide_of(grammars, Grammar("regex", "[a-c]x"))
    masks = grammars.masks([4, 0, 1], [None, (guide, 0), None])
    assert masks.shape == (ROWS, 1 + -(-tokenizer.vocab_size // 32))
    assert masks[:, 0].tolist() == [BY_BITS, *[ANY_TOKEN] * (ROWS - 1)]
    assert 3 <= np.unpackbits(masks[0, 1:].view(np.uint8)).sum() <= 6, "a, b, c, and each with its x where that is a token"
    assert grammars.masks([2], [None]) is masks and (masks[:, 0] == ANY_TOKEN).all()


def test_tokens_are_told_many_at_once(
    grammars: Grammars, tokenizer: Tokenizer, allowed: Callable[[AnyGuide], set[int]]
) -> None:
    """All guides of a step before any is asked, some of them beyond what they can take."""
    texts = {"12ab": (4, "complete"), "12a": (3, "more"), "1": (1, "more"), "1x2ab": (1, "refused"), "12abc": (4, "complete")}
    guides = {text: guide_of(grammars, Grammar("regex", "[0-9][0-9][a-z][a-z]")) for text in texts}
    tokens = {text: [tokenizer.encode(letter, False)[0] for letter in text] for text in texts}
    assert {len(ids) for ids in tokens.values()} == {4, 3, 1, 5}
    for text, guide in guides.items():
        guide.tell(tokens[text])
    assert {text: guide.took() for text, guide in guides.items()} == texts
    assert {tokenizer.token_text(t) for t in allowed(guides["1"])} == set("0123456789")
    assert {tokenizer.token_text(t) for t in allowed(guides["12a"])} == set("abcdefghijklmnopqrstuvwxyz")


def test_rows_change_hands(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """A text that lost its row and goes on does not write into the row of the one that has it."""
    one, other = (guide_of(grammars, Grammar("regex", f"[{letters}]{{9}}")) for letters in ("ab", "cd"))

    def letters_of(row: int, guide: AnyGuide) -> set[str]:
        words = grammars.masks([row], [(guide, 0)])[row, 1:].copy()
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: tokenizer.vocab_size]
        return {letter for t in np.flatnonzero(bits).tolist() for letter in tokenizer.token_text(t)}

    assert letters_of(1, one) == set("ab") and letters_of(1, other) == set("cd")
    assert take(one, tokenizer, "a") == take(one, tokenizer, "b") == "more"
    assert letters_of(1, other) == set("cd") and letters_of(2, one) == set("ab")


def test_what_was_made_is_kept_within_a_bound(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    words = vocabulary(tokenizer, tokenizer.vocab_size, [0])
    maker = GuideMaker(lambda: words, tokenizer.vocab_size)
    asked = [Grammar("regex", f"[a-z]{{{n}}}") for n in range(1, 9)]
    monkeypatch.setattr(room, "CACHE_BYTES", room.cost_bytes(asked[0]) * 3 + 100)
    for grammar in (*asked[:3], asked[0], asked[3]):
        maker.make(grammar, hurries=True)
    assert list(maker._made) == [asked[2], asked[0], asked[3]], "the one that was not asked for again is let go"
    assert maker._bytes == sum(map(room.cost_bytes, maker._made))
