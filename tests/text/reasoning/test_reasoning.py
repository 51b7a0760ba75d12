"""Where reasoning begins and ends, by the reply and by the end of the prompt, and that no cut of the text shows."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from split_points import read, read_anyhow, read_everywhere

from minivllm.text.reasoning.deepseek_r1 import DeepseekR1
from minivllm.text.reasoning.openai_gptoss import OpenAIGptOss
from minivllm.text.reasoning.qwen3 import Qwen3
from minivllm.text.reasoning.registry import PARSERS, reasoning_parser
from minivllm.text.reply import Reply

PLAIN = "<|im_start|>assistant\n"
OPEN = PLAIN + "<think>\n"
CLOSED = PLAIN + "<think>\n\n</think>\n\n"

# prompt, text, reasoning and content as Qwen3 reads them, and as DeepSeek-R1 does where that differs
TRANSCRIPTS = {
    "empty": (PLAIN, "", "", "", None),
    "a block": (PLAIN, "<think>\nHm.\n\nYes.\n</think>\n\nHi!\n", "Hm.\n\nYes.", "Hi!\n", None),
    "a block without whitespace": (PLAIN, "<think>Hm.</think>Hi!", "Hm.", "Hi!", None),
    "whitespace before the block": (PLAIN, " \n<think>Hm.</think>Hi!", "Hm.", "Hi!", None),
    "an empty block": (PLAIN, "<think>\n\n</think>\n\nHi!", "", "Hi!", None),
    "only a block": (PLAIN, "<think>Hm.</think>\n\n", "Hm.", "", None),
    "a block without end": (PLAIN, "<think>\nHm. \n", "Hm. \n", "", None),
    "half an end": (PLAIN, "<think>\nHm. </thin", "Hm. </thin", "", None),
    "half a beginning": (PLAIN, " <thin", "", " <thin", ("<thin", "")),
    "no block": (PLAIN, " Hi <think>!</think> ", "", " Hi <think>!</think> ", ("Hi <think>!", "")),
    "no block, other tags": (PLAIN, "<b>Hi</b>\n", "", "<b>Hi</b>\n", ("<b>Hi</b>\n", "")),
    "only an end": (PLAIN, "Hm.\n</think>\nHi!", "", "Hm.\n</think>\nHi!", ("Hm.", "Hi!")),
    "marks behind the block": (PLAIN, "<think>a</think>b<think>c</think> d", "a", "b<think>c</think> d", None),
    "marks in the block": (PLAIN, "<think>a <think> </ think> < b</think>c", "a <think> </ think> < b", "c", None),
    "Unicode": (PLAIN, "<think>\nжду 🤔\u00a0\n</think>\n👍🏽", "жду 🤔\u00a0", "👍🏽", None),
    "open": (OPEN, "Hm.\n</think>\n\nHi!", "Hm.", "Hi!", None),
    "open, and opened again": (OPEN, "\n<think>\nHm.</think>Hi!", "Hm.", "Hi!", None),
    "open, and closed at once": (OPEN, "\n</think>\nHi!", "", "Hi!", None),
    "open, and whitespace": (OPEN, "\n \n", "", "", None),
    "closed": (CLOSED, " Hi! <think>no</think>", "", " Hi! <think>no</think>", None),
    "closed, and a block": (CLOSED, "<think>no</think>", "", "<think>no</think>", None),
    "a block earlier in the prompt": (CLOSED + "x" + PLAIN, "<think>Hm.</think>Hi!", "Hm.", "Hi!", None),
    "no prompt": ("", "<think>Hm.</think>Hi!", "Hm.", "Hi!", None),
}  # fmt: skip


@pytest.mark.parametrize("case", TRANSCRIPTS)
def test_a_transcript(case: str) -> None:
    prompt, text, reasoning, content, r1 = TRANSCRIPTS[case]
    assert read_everywhere(lambda: Qwen3(prompt), text) == Reply(reasoning, content)
    assert read_everywhere(lambda: DeepseekR1(prompt), text) == Reply(*(r1 or (reasoning, content)))


# What gpt-oss's parser passes on keeps its marks.
HARMONY = {
    "empty": ("", "", ""),
    "plain text": ("Hi", "", "Hi"),
    "answer": ("<|channel|>final<|message|>Hi<|return|>", "", "<|channel|>final<|message|>Hi<|return|>"),
    "both": (
        "<|channel|>analysis<|message|> Hm\n<|end|><|start|>assistant<|channel|>final<|message|>Hi<|return|>",
        " Hm\n",
        "<|start|>assistant<|channel|>final<|message|>Hi<|return|>",
    ),
    "two thoughts": (
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>\nc",
        "a\nb",
        "\nc",
    ),
    "without end": ("<|channel|>analysis<|message|>a 🤔<|en", "a 🤔<|en", ""),
    "a call": (
        "<|channel|>analysis to=functions.f<|message|>{}<|call|>",
        "",
        "<|channel|>analysis to=functions.f<|message|>{}<|call|>",
    ),
    "half a header": ("<|channel|>analysis<|mess", "", "<|channel|>analysis<|mess"),
}


@pytest.mark.parametrize("case", HARMONY)
def test_what_is_not_analysis_keeps_its_marks(case: str) -> None:
    text, reasoning, content = HARMONY[case]
    assert read_everywhere(lambda: OpenAIGptOss("<|start|>assistant"), text) == Reply(reasoning, content)


def test_a_harmony_prompt_may_end_inside_the_reasoning() -> None:
    prompt = "<|start|>assistant<|channel|>analysis<|message|>"
    text = "Hm<|end|><|start|>assistant<|channel|>final<|message|>Hi"
    assert read_everywhere(lambda: OpenAIGptOss(prompt), text) == Reply("Hm", "<|start|>assistant<|channel|>final<|message|>Hi")


def test_reasoning_streams_and_only_a_mark_is_held_back() -> None:
    parser = Qwen3(PLAIN)
    assert parser.feed("<think") == []
    assert [p.text for p in parser.feed(">\nHm </thi")] == ["Hm"]
    assert [p.text for p in parser.feed("s")] == [" </this"]
    assert [(p.kind, p.text) for p in parser.feed("</think>\n\nHi ")] == [("content", "Hi ")]


def bare(text: str) -> str:
    """A text without marks and whitespace: what no parser may lose."""
    return "".join(text.replace("<think>", "").replace("</think>", "").split())


PARTS = ["<think>", "</think>", "<thi", "</", ">", "x", " ", "\n", "🎉", "<|channel|>"]


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=200, deadline=None)
@given(
    prompt=st.sampled_from([PLAIN, OPEN, CLOSED]),
    text=st.lists(st.sampled_from(PARTS), max_size=20).map("".join),
    cuts=st.lists(st.integers(0, 100), max_size=4),
)
def test_mark_soup_reads_the_same_however_it_is_cut(name: str, prompt: str, text: str, cuts: list[int]) -> None:
    reply = read_anyhow(lambda: reasoning_parser(name)(prompt), text, cuts)
    assert bare(reply.reasoning + reply.content) == bare(text)


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.parametrize("unit", ["x", " ", "<", "<think>", "</think"])
def test_a_long_text_by_characters(name: str, unit: str) -> None:
    text = f"<think>x{unit * (100_000 // len(unit))}</think>y"
    reply = read(reasoning_parser(name)(PLAIN), text)
    if name == "openai_gptoss":
        assert reply == Reply(content=text)
    else:
        assert reply == Reply(text[7:-9].rstrip(), "y")


def test_names() -> None:
    assert [reasoning_parser(name) for name in PARSERS] == [Qwen3, DeepseekR1, OpenAIGptOss]
    assert {reasoning_parser(name).END for name in PARSERS} == {"</think>", "<|channel|>final<|message|>"}
