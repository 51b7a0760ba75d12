"""Public tokenizers, exactly: published ids, published conversations, every character, and stop strings in real tokens.

The files lie beside the checkout (``shared_data``); without them these tests are skipped. ``test_tokenizer`` and
``test_detokenizer`` say the same of small tokenizers that need no files.
"""

import functools
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from minivllm.text.chat import ChatTemplate
from minivllm.text.outputs import OutputProcessor
from minivllm.text.tokenizer import Tokenizer, load_tokenizer
from minivllm.types import SamplingParams, TokenEvent

TEXTS = [
    "", " ", "  leading and trailing  ", "Once upon a time, there was a fox.", "tabs\tand\nnewlines\r\n\n\n  x",
    "ALL CAPS 1234567890", "naïve café Ελληνικά русский 你好世界 こんにちは 한국어 हिन्दी العربية עברית ไทย",
    "😀👍🏽🎉 👨\u200d👩\u200d👧 🇩🇪", "e\u0301 \u200b \u00a0 \u2028 \ufeff x",
    "def f(x):\n    return {'a': x[0], \"b\": -1.5e-3}  # ok",
    "<b>html &amp; entities</b>", "a" * 400, " " * 40 + "x", "[INST] </s <s> <0x41> ▁", "\x00\x01\x1f\x7f\x80\uffff\U0010ffff",
    "https://example.org/a?b=c&d=%20#e", "$x_1 \\in \\mathbb{R}$ ½ ² ① ﬁ ﷺ",
]  # fmt: skip
WITH_TOOLS = ["get_weather_full", "get_weather_no_history", "get_weather_no_system_prompt", "several_calls", "parallel_calls"]
SAMPLES = [("no_tools", 1), *((sample, version) for sample in ["no_tools", *WITH_TOOLS] for version in (2, 3))]

# How mistral-common writes a conversation. This tokenizer.json begins every stretch between two control tokens with a space of
# its own, so the template writes none there. Versions 2 and 3 put the system's words and the tools to the last user message;
# version 2 leaves out tool calls before that message, and gives the results of several calls in one list.
CHAT = """
{%- set system = messages | selectattr("role", "equalto", "system") | map(attribute="content") | list %}
{%- set place = namespace(last_user=0) %}
{%- for m in messages if m.role == "user" %}{% set place.last_user = loop.index0 %}{% endfor %}
{%- set turns = messages | rejectattr("role", "equalto", "system") | list %}
{%- for m in turns %}{% if m.role == "user" %}{% set place.last_user = loop.index0 %}{% endif %}{% endfor %}
{{- bos_token }}
{%- for m in turns %}
    {%- set shown = version == 3 or loop.index0 > place.last_user %}
    {%- if m.role == "user" and version == 1 %}
        {{- "[INST] " + m.content + " [/INST]" }}
    {%- elif m.role == "user" %}
        {%- set is_last = loop.index0 == place.last_user %}
        {%- if is_last and tools %}{{ "[AVAILABLE_TOOLS]" + tools | tojson + "[/AVAILABLE_TOOLS]" }}{% endif %}
        {{- "[INST]" + ((system if is_last else []) + [m.content]) | join("\\n\\n") + "[/INST]" }}
    {%- elif m.role == "assistant" and m.tool_calls %}
        {%- if shown %}
            {{- "[TOOL_CALLS][" }}
            {%- for call in m.tool_calls %}
                {{- '{"name": ' + call.function.name | tojson + ', "arguments": ' + call.function.arguments | tojson }}
                {{- (', "id": ' + call.id | tojson if version == 3 else "") + "}" + ("" if loop.last else ", ") }}
            {%- endfor %}
            {{- "]" + eos_token }}
        {%- endif %}
    {%- elif m.role == "assistant" %}
        {{- (" " if version == 1 else "") + m.content + eos_token }}
    {%- elif version == 3 %}
        {{- '[TOOL_RESULTS]{"content": ' + m.result | tojson + ', "call_id": ' + m.tool_call_id | tojson + "}[/TOOL_RESULTS]" }}
    {%- elif shown %}
        {{- "[TOOL_RESULTS][" if loop.previtem.role != "tool" else ", " }}
        {{- '{"name": ' + m.name | tojson + ', "content": ' + m.result | tojson + "}" }}
        {{- "][/TOOL_RESULTS]" if loop.last or loop.nextitem.role != "tool" else "" }}
    {%- endif %}
{%- endfor %}
"""


@pytest.fixture(scope="session")
def public(shared_data: Path) -> Callable[[str], Path]:
    """The folder of a public tokenizer."""

    def find(name: str) -> Path:
        path = shared_data / "tokenizers" / name
        if not path.is_dir():
            pytest.skip(f"{name} is not in the shared data")
        return path

    return find


@pytest.fixture(scope="session")
def load(public: Callable[[str], Path]) -> Callable[[str], Tokenizer]:
    """A public tokenizer, read once."""
    return functools.cache(lambda name: load_tokenizer(public(name)))


def stream(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The deltas, the last from finish()."""
    state = tokenizer.detokenizer()
    return [*map(state.add, ids), state.finish()]


# ---------------------------------------------------------------------------------------------------------- published answers


def test_gpt2_ids_that_llama_cpp_publishes(public: Callable[[str], Path], load: Callable[[str], Tokenizer]) -> None:
    cases = json.loads((public("gpt2") / "llama_cpp_vectors.json").read_text(encoding="utf-8"))
    assert len(cases) == 43
    gpt2 = load("gpt2")
    for case in cases:
        assert gpt2.encode(case["text"]) == case["ids"]
        assert gpt2.decode(case["ids"]) == "".join(stream(gpt2, case["ids"])) == case["text"]


@pytest.mark.parametrize("name", ["gpt2", "mistral-v1", "mistral-v3"])
def test_varied_texts_come_back(public: Callable[[str], Path], load: Callable[[str], Tokenizer], name: str) -> None:
    """As the library gives them. A SentencePiece vocabulary cannot tell U+2581 from a space; nothing else is lost."""
    library, ours = tokenizers.Tokenizer.from_file(str(public(name) / "tokenizer.json")), load(name)
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == library.encode(text, add_special_tokens=False).ids
        back = ours.decode(ids, skip_special_tokens=False)
        assert back == library.decode(ids, skip_special_tokens=False)
        written = [t for t in ("<s>",) if name != "gpt2" and t in text]  # becomes the control token, so a space comes behind
        if not written:
            assert back == "".join(stream(ours, ids)) == (text if name == "gpt2" else text.replace("▁", " "))


@pytest.mark.parametrize("name", ["mistral-v1", "mistral-v3"])
def test_ids_are_those_of_sentencepiece(public: Callable[[str], Path], load: Callable[[str], Tokenizer], name: str) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(public(name) / "tokenizer.model"))
    for text in TEXTS:
        if "<s>" not in text:  # sentencepiece itself reads no control tokens in a text
            assert load(name).encode(text, add_special_tokens=False) == reference.encode(text)


# ---------------------------------------------------------------------------------------------------------------------- chat


def prepared(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as mistral-common hands it on: JSON in a tool's arguments and results is read where it is JSON."""
    made = dict(message)
    if message.get("tool_calls"):
        calls = [dict(c, function=dict(c["function"])) for c in message["tool_calls"]]
        for call in calls:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        made["tool_calls"] = calls
    if message["role"] == "tool":
        try:
            made["result"] = json.loads(message["content"])
        except ValueError:
            made["result"] = message["content"]
    return made


@pytest.mark.parametrize(("sample", "version"), SAMPLES)
def test_conversations_of_mistral_common(
    public: Callable[[str], Path], load: Callable[[str], Tokenizer], sample: str, version: int
) -> None:
    """The rendered text and its ids are the published ones, tools and tool calls included."""
    folder = public("mistral-chat-samples") / sample
    asked = json.loads((folder / "sample.json").read_text(encoding="utf-8"))
    template = ChatTemplate(CHAT, {"bos_token": "<s>", "eos_token": "</s>"})
    messages = [prepared(m) for m in asked["messages"]]
    text = template.render(messages, add_generation_prompt=False, tools=asked["tools"], version=version)
    tokenizer = load("mistral-v1" if version == 1 else "mistral-v3")
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == json.loads((folder / f"tokens_v{version}.json").read_text(encoding="utf-8"))["tokens"]
    published = (folder / f"text_v{version}.txt").read_text(encoding="utf-8").replace("▁", " ").replace("<0x0A>", "\n")
    control = r"(</?s>)(?=.)" if version == 1 else r"(<s>|</s>|\[/?[A-Z_]+\])(?=[^<\[]|\[[^A-Z/])"
    spaced = re.sub(control, r"\1 ", text)  # the space that the tokenizer puts behind it
    assert spaced == published


# ------------------------------------------------------------------------------------------------------------ every character


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "mistral-v3"])
def test_every_unicode_scalar_value_streams_whole(load: Callable[[str], Tokenizer], name: str) -> None:
    """All 1,112,064 of them: nothing is lost, and no delta shows a part of one."""
    tokenizer, met = load(name), 0
    for begin in range(0, 0x110000, 0x800):
        text = "".join(map(chr, range(begin, begin + 0x800))) if not 0xD800 <= begin < 0xE000 else ""
        deltas = stream(tokenizer, tokenizer.encode(text, add_special_tokens=False))
        joined = "".join(deltas)
        assert joined == (text if name == "gpt2" else text.replace("▁", " "))
        assert sum("\ufffd" in d for d in deltas) == ("\ufffd" in text)
        met += len(text)
    assert met == 1_112_064


@pytest.mark.parametrize("name", ["gpt2", "mistral-v3"])
def test_any_bytes_in_any_cut(load: Callable[[str], Tokenizer], name: str) -> None:
    """Arbitrary bytes, whole characters beside broken ones, spelled by tokens at random: one decoding of all the bytes."""
    tokenizer, rng = load(name), random.Random(4)
    table: dict[bytes, list[int]] = {}
    for token in range(tokenizer.vocab_size):
        if token not in tokenizer.special_ids:
            table.setdefault(tokenizer.token_bytes(token), []).append(token)
    assert all(bytes((b,)) in table for b in range(256))
    broken = 0
    for _ in range(2000):
        texts = [rng.choice(TEXTS)[:12].encode() for _ in range(6)]
        parts = [text if rng.random() < 0.5 else rng.randbytes(rng.randrange(1, 5)) for text in texts]
        raw = b"x" + b"".join(part[: rng.randrange(1, 13)] for part in parts)  # behind a letter nothing is stripped
        ids, at = [], 0
        while at < len(raw):
            size = next(n for n in range(rng.randrange(1, 8), 0, -1) if raw[at : at + n] in table)
            ids.append(rng.choice(table[raw[at : at + size]]))
            at += len(raw[at : at + size])
        text = raw.decode("utf-8", "replace")
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids) == text
        broken += "\ufffd" in text
    assert 1000 < broken < 2000


# --------------------------------------------------------------------------------------------------------------- stop strings


def first_end(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """By definition: the first character that completes a stop string, and the longest one that it completes."""
    for end in range(1, len(text) + 1):
        if found := [s for s in stops if text[:end].endswith(s)]:
            return end, max(found, key=len)
    return None


def held(text: str, stops: Sequence[str]) -> int:
    """By definition: the longest end of the text that is a proper beginning of a stop string."""
    return max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)


@functools.cache
def one_byte_tokens(tokenizer: Tokenizer) -> dict[int, int]:
    """Byte -> the token that stands for it alone."""
    pieces = [(tokenizer.token_bytes(i), i) for i in reversed(range(tokenizer.vocab_size))]
    return {piece[0]: i for piece, i in pieces if len(piece) == 1}


def spelled(tokenizer: Tokenizer, text: str, rng: random.Random) -> list[int]:
    """The text in one of the many ways that tokens can spell it: stretches in the tokens of their own, others byte by byte."""
    before = tokenizer.encode("x", add_special_tokens=False)
    ids, at = [], 0
    while at < len(text):
        piece = text[at : at + rng.randrange(1, 12)]
        at += len(piece)
        own = tokenizer.encode("x" + piece, add_special_tokens=False)
        if own[: len(before)] == before and rng.random() < 0.5:
            ids += own[len(before) :]
        else:
            ids += [one_byte_tokens(tokenizer)[byte] for byte in piece.encode()]
    return ids


@pytest.mark.parametrize("name", ["gpt2", "mistral-v3"])
def test_stop_strings_in_any_cut_of_real_tokens(load: Callable[[str], Tokenizer], name: str) -> None:
    """Whatever tokens spell a text and however many come at once: it ends at one place, and no more is held than must be."""
    tokenizer, rng, num_matched = load(name), random.Random(5), 0
    for _ in range(150):
        text = "x" + rng.choice(TEXTS[3:10]) + rng.choice(TEXTS[3:10])
        places = [rng.randrange(len(text)) for _ in range(rng.randrange(1, 4))]
        stops = [text[at : at + rng.randrange(1, 9)] + rng.choice(["", "", "x", "é", "😀"]) for at in places]
        include = rng.random() < 0.5
        sampling = SamplingParams(stop=tuple(stops), include_stop_str_in_output=include, max_tokens=10_000)
        expected = first_end(text, stops)
        num_matched += expected is not None
        for _ in range(3):
            ids, processor, plain = spelled(tokenizer, text, rng), OutputProcessor(tokenizer), tokenizer.detokenizer()
            processor.add("r", [], sampling)
            shown = decoded = ""
            stopped = None
            while ids and stopped is None:
                some = tuple(ids[: rng.choice((1, 1, 2, 5))])
                ids = ids[len(some) :]
                (output,), _ = processor.process([TokenEvent(id="r", token_ids=some)])
                shown += output.text
                stopped = output.stop_reason
                if stopped is None:
                    decoded += "".join(map(plain.add, some))
                    assert shown == decoded[: len(decoded) - held(decoded, stops)]
            assert stopped == (expected and expected[1])
            if expected is not None:
                assert shown == text[: expected[0] if include else expected[0] - len(expected[1])]
    assert 30 < num_matched < 150
