"""logit_bias, allowed_token_ids and bad_words on the bundled model, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from minivllm.door import spell
from minivllm.errors import InvalidRequest
from minivllm.llm import LLM
from minivllm.types import SamplingParams

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def llm(bundled_model: Path) -> LLM:
    return LLM(str(bundled_model), device="cpu", num_threads=1, max_num_seqs=4, num_gpu_blocks_override=40)


def asked(**more: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, **more)


def test_tokens_are_forced_and_forbidden(llm: LLM) -> None:
    base = llm.generate([PROMPT], asked())[0].token_ids
    forced, without, few = llm.generate(
        [PROMPT] * 3,
        [
            asked(logit_bias=((base[3], 100.0),)),
            asked(logit_bias=tuple((token, -100.0) for token in set(base))),
            asked(allowed_token_ids=tuple(base[:2])),
        ],
    )
    assert forced.token_ids == [base[3]] * 24
    assert not set(without.token_ids) & set(base)
    assert set(few.token_ids) <= set(base[:2])


def test_bad_words_do_not_come(llm: LLM) -> None:
    """Words of a greedy text are forbidden one after the other; each time another text comes, without any of them."""
    words: list[str] = []
    for _ in range(4):
        text = llm.generate([PROMPT], asked(bad_words=tuple(words)))[0].text
        assert not [word for word in words if f" {word} " in f" {text} "]
        words.append(next(word for word in text.split() if word.isalpha() and word not in words))
    spelled = spell(asked(bad_words=("Lily", " Lily")), llm.tokenizer, llm.info.vocab_size, 20).bad_word_ids
    texts = {llm.tokenizer.decode(list(ids)) for ids in spelled}
    assert "Lily" in texts and texts <= {"Lily", " Lily"} and len(spelled) == len(texts)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("logit_bias", [((0, 101.0),), ((0, float("nan")),), ((3, 1.0), (3, 2.0)), tuple((i, 1.0) for i in range(1025))]),
        ("allowed_token_ids", [()]),
        ("bad_word_ids", [((),)]),
        ("bad_words", [("",), (" ",), tuple(map(str, range(300))), ("x" * 70_000,)]),
    ],
)
def test_out_of_range(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidRequest, match=field) as caught:
            SamplingParams(**{field: value})
        assert caught.value.param == {"bad_word_ids": "bad_words"}.get(field, field)


@pytest.mark.parametrize(
    "more",
    [
        {"logit_bias": ((10**6, 1.0),)}, {"logit_bias": ((-1, 1.0),)}, {"allowed_token_ids": (10**6,)},
        {"bad_words": ("x",), "bad_word_ids": ((10**6,),)},
    ],
)  # fmt: skip
def test_tokens_that_are_not_there(llm: LLM, more: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="outside the vocabulary") as caught:
        llm.generate([PROMPT], asked(**more))
    assert caught.value.param == next(iter(more))
    assert not llm.engine.has_work
