"""What a request can ask for, by the official client from the real server process."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from live_server import LiveServer, serve

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
