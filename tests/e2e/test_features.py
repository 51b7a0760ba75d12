"""What a request can ask for, by the official client from the real server process."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from live_server import LiveServer, serve

from minivllm.beams import BeamSearchParams
from minivllm.llm import LLM

PROMPT = "Once upon a time there was a little"


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with serve("--override-generation-config", '{"temperature": 0.7}', "--enable-prompt-tokens-details") as live:
        yield live


@pytest.fixture
def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def complete(client: openai.OpenAI, **more: Any) -> Any:
    return client.completions.create(**{"model": "stories", "prompt": PROMPT, "max_tokens": 12, "seed": 1, **more})


def test_several_texts_with_logprobs(client: openai.OpenAI) -> None:
    done = complete(client, n=4, temperature=1.0, logprobs=3)
    assert len({choice.text for choice in done.choices}) == 4
    again = complete(client, n=4, temperature=1.0, logprobs=3)
    assert [c.text for c in again.choices] == [c.text for c in done.choices]
    assert done.usage.completion_tokens == sum(len(c.logprobs.tokens) for c in done.choices)
    assert again.usage.prompt_tokens_details.cached_tokens <= again.usage.prompt_tokens < 20
    for choice in done.choices:
        assert choice.text.strip() in "".join(choice.logprobs.tokens)
        assert all(value <= 0 for value in choice.logprobs.token_logprobs)
        assert all(3 <= len(top) <= 4 for top in choice.logprobs.top_logprobs)
    streamed: dict[int, str] = dict.fromkeys(range(4), "")
    tokens: dict[int, list[str]] = {i: [] for i in range(4)}
    for chunk in complete(client, n=4, temperature=1.0, logprobs=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
    assert [streamed[i] for i in range(4)] == [c.text for c in done.choices]
    assert [tokens[i] for i in range(4)] == [c.logprobs.tokens for c in done.choices]


def test_a_text_that_repeats_itself_ends(client: openai.OpenAI) -> None:
    ids = complete(client, temperature=0, extra_body={"return_token_ids": True}).choices[0].model_extra["token_ids"]
    body = {"repetition_detection": {"max_pattern_size": 4, "min_count": 3}}
    bias = {"logit_bias": {str(ids[0]): 100}, "temperature": 0}
    done = complete(client, **bias, extra_body=body)
    assert done.choices[0].finish_reason == "repetition" and done.choices[0].stop_reason == "repetition_detected"
    assert done.usage.completion_tokens == 3 and done.choices[0].text
    chunks = list(complete(client, **bias, extra_body=body, stream=True))
    assert chunks[-1].choices[0].finish_reason == "repetition"
    assert "".join(chunk.choices[0].text for chunk in chunks) == done.choices[0].text
    later = complete(client, **bias, extra_body={**body, "min_tokens": 7})
    assert later.usage.completion_tokens == 7
    messages: Any = [{"role": "user", "content": "Hello"}]
    chat = client.chat.completions.create(model="stories", messages=messages, max_tokens=9, **bias, extra_body=body)
    assert chat.choices[0].finish_reason == "repetition"


def test_beam_search(client: openai.OpenAI, server: LiveServer, bundled_model: Path) -> None:
    """The texts that ``LLM`` finds; with logprobs, ids, several prompts and an echo."""
    prompts = [PROMPT, "The fox"]
    llm = LLM(str(bundled_model), device="cpu", num_threads=1)
    expected = [
        text
        for texts in llm.beam_search(prompts, BeamSearchParams(beam_width=3, max_tokens=12, length_penalty=0.5))
        for text in texts
    ]
    asked: Any = {"use_beam_search": True, "length_penalty": 0.5, "return_token_ids": True}
    done = complete(client, prompt=prompts, n=3, temperature=0, logprobs=2, extra_body=asked)
    assert [choice.text for choice in done.choices] == [text.text for text in expected]
    assert [choice.model_extra["token_ids"] for choice in done.choices] == [text.token_ids for text in expected]
    assert len({choice.text for choice in done.choices[:3]}) == 3
    assert done.usage.completion_tokens == sum(len(text.token_ids) for text in expected)
    assert done.usage.prompt_tokens == sum(len(texts.prompt_ids) for texts in expected[::3])
    scores = [
        sum(c.logprobs.token_logprobs) / (len(c.model_extra["prompt_token_ids"]) + len(c.logprobs.tokens)) ** 0.5
        for c in done.choices
        if c.finish_reason == "length"
    ]
    assert scores[:3] == sorted(scores[:3], reverse=True)
    echoed = complete(client, n=3, echo=True, extra_body=asked)
    assert [choice.text for choice in echoed.choices] == [PROMPT + text.text for text in expected[:3]]
    server.wait_idle()


def test_a_search_that_nobody_waits_for_ends(client: openai.OpenAI, server: LiveServer) -> None:
    body = {"prompt": [PROMPT] * 4, "n": 8, "use_beam_search": True, "max_tokens": 400, "ignore_eos": True}
    before = server.metrics()["total_tokens_generated"]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=1.0)
    server.wait_idle()
    time.sleep(0.3)  # between two tokens of a search nothing runs either
    after = server.wait_idle()["total_tokens_generated"]
    assert before < after < before + 4 * 8 * 400, "it had begun, and it was not finished"
    time.sleep(0.3)
    assert server.wait_idle()["total_tokens_generated"] == after


def test_the_best_of_several(client: openai.OpenAI) -> None:
    """Of the texts that n would give, those with the highest sum of logprobs, best first; all that was generated counts."""
    prompts = [PROMPT, "The fox"]
    every = complete(client, prompt=prompts, n=6, temperature=1.0, logprobs=0)
    totals = {choice.text: sum(choice.logprobs.token_logprobs) for choice in every.choices}
    best = [c.text for half in (every.choices[:6], every.choices[6:]) for c in sorted(half, key=lambda c: -totals[c.text])[:2]]
    done = complete(client, prompt=prompts, n=2, best_of=6, temperature=1.0)
    assert [choice.text for choice in done.choices] == best
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    assert all(choice.logprobs is None for choice in done.choices)
    assert done.usage.completion_tokens == every.usage.completion_tokens
    told = complete(client, prompt=PROMPT, best_of=6, temperature=1.0, logprobs=2, echo=True).choices[0]
    assert told.text == PROMPT + best[0] and told.text.endswith("".join(told.logprobs.tokens[-12:]))
    assert sum(told.logprobs.token_logprobs[-12:]) == pytest.approx(totals[best[0]], abs=1e-3)
    streamed = complete(client, n=2, best_of=2, temperature=1.0, stream=True)
    texts = ["", ""]
    for choice in (choice for chunk in streamed for choice in chunk.choices):
        texts[choice.index] += choice.text
    assert texts == [choice.text for choice in every.choices[:2]]


def test_logprobs_of_prompts(client: openai.OpenAI) -> None:
    """What a text was told of its tokens is told of them again when they are a prompt; an echo shows the same."""
    asked = {"return_token_ids": True}
    first = complete(client, temperature=1.0, logprobs=2, extra_body=asked).choices[0]
    ids = first.model_extra["prompt_token_ids"] + first.model_extra["token_ids"]
    done = complete(client, prompt=ids, n=2, max_tokens=3, temperature=1.0, extra_body={"prompt_logprobs": 2})
    for choice in done.choices:
        told = choice.model_extra["prompt_logprobs"]
        assert len(told) == len(ids) and told[0] is None and choice.logprobs is None
        for at, value in enumerate(first.logprobs.token_logprobs, start=len(ids) - 12):
            entry = told[at][str(ids[at])]
            assert entry["logprob"] == pytest.approx(value, abs=1e-3)
            assert entry["decoded_token"] == first.logprobs.tokens[at - len(ids) + 12]
            assert 2 <= len(told[at]) <= 3 and [e["rank"] for e in told[at].values()][-2:] in ([1, 2], [2, 1])
    whole = complete(client, prompt=ids, n=2, max_tokens=3, temperature=1.0, logprobs=1, echo=True)
    text = "".join(whole.choices[0].logprobs.tokens[: len(ids)])
    for choice in whole.choices:
        found = choice.logprobs
        assert len(found.tokens) == len(found.top_logprobs) == len(found.text_offset) == len(ids) + 3
        assert choice.text.startswith(text) and choice.text == "".join(found.tokens)
        assert found.text_offset == [sum(map(len, found.tokens[:i])) for i in range(len(ids) + 3)]
        assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
        for at, entry in enumerate(told[1:], start=1):
            assert found.token_logprobs[at] == pytest.approx(entry[str(ids[at])]["logprob"], abs=1e-3)
            assert 1 <= len(found.top_logprobs[at]) <= 2
    pieces: dict[int, Any] = {0: [], 1: []}
    for chunk in complete(client, prompt=ids, n=2, max_tokens=3, temperature=1.0, logprobs=1, echo=True, stream=True):
        for choice in chunk.choices:
            pieces[choice.index].append(choice)
    for choice in whole.choices:
        mine = pieces[choice.index]
        assert "".join(piece.text for piece in mine) == choice.text
        values = [value for piece in mine if piece.logprobs for value in piece.logprobs.token_logprobs]
        assert values[0] is None and values[1:] == pytest.approx(choice.logprobs.token_logprobs[1:], abs=1e-3)


def test_many_logprobs_of_prompts(client: openai.OpenAI) -> None:
    prompts: Any = [[5 + i % 50 for i in range(300)], [9] * 300]
    done = complete(client, prompt=prompts, max_tokens=1, logprobs=0, echo=True)
    for prompt, choice in zip(prompts, done.choices, strict=True):
        alone = complete(client, prompt=prompt, max_tokens=1, logprobs=0, echo=True).choices[0].logprobs
        assert choice.logprobs.tokens[:300] == alone.tokens[:300]
        assert choice.logprobs.token_logprobs[1:300] == pytest.approx(alone.token_logprobs[1:300], abs=1e-3)


def test_a_chat_tells_logprobs_of_its_prompt(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Tell me of a small bear."}]
    body = {"prompt_logprobs": 1, "return_token_ids": True}
    done = client.chat.completions.create(model="stories", messages=messages, max_tokens=3, n=2, extra_body=body)
    ids, told = done.model_extra["prompt_token_ids"], done.model_extra["prompt_logprobs"]
    assert told[0] is None and all(str(token) in entry for token, entry in zip(ids[1:], told[1:], strict=True))


def test_tokens_by_name(client: openai.OpenAI) -> None:
    plain = complete(client, temperature=0, extra_body={"return_token_ids": True}).choices[0]
    ids = plain.model_extra["token_ids"]
    forced = complete(client, temperature=0, logit_bias={str(ids[0]): 100}, extra_body={"return_token_ids": True}).choices[0]
    assert forced.model_extra["token_ids"] == [ids[0]] * 12
    few = {"allowed_token_ids": ids[:2], "return_token_ids": True}
    assert set(complete(client, temperature=0, extra_body=few).choices[0].model_extra["token_ids"]) <= set(ids[:2])
    word = plain.text.split()[0]
    assert word not in complete(client, temperature=0, extra_body={"bad_words": [word]}).choices[0].text.split()[:1]


def test_a_chat_with_logprobs(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Tell me a story about a bear."}]
    ask: dict[str, Any] = {"model": "stories", "messages": messages, "max_tokens": 10, "seed": 3, "n": 2, "logprobs": True}
    done = client.chat.completions.create(**ask, top_logprobs=2)
    assert len(done.choices) == 2 and done.choices[0].message.content != done.choices[1].message.content
    for choice in done.choices:
        assert choice.logprobs is not None and choice.logprobs.content is not None
        said = b"".join(bytes(t.bytes or []) for t in choice.logprobs.content).decode("utf-8", "replace")
        assert (choice.message.content or "").strip() in said
        assert all(len(t.top_logprobs) == 2 for t in choice.logprobs.content)
