"""The OpenAI-compatible routes: shapes of replies and chunks, and the official client."""

import asyncio
import json
import re
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from scripted_engine import STORY, Live

COMPLETION = {"prompt": "Tell me", "max_tokens": 6}
CHAT = {"messages": [{"role": "user", "content": "Tell me"}], "max_tokens": 6}


def events(text: str) -> list[Any]:
    """The JSON of each event; the mark at the end as it is."""
    found = [block.removeprefix("data: ") for block in text.split("\n\n") if block]
    return [f if f == "[DONE]" else json.loads(f) for f in found]


def said(live: Live, num_tokens: int) -> str:
    return live.tokenizer.decode(live.tokenizer.encode(STORY)[:num_tokens])


def test_completion(http: httpx.Client, live: Live) -> None:
    reply = http.post("/v1/completions", json=COMPLETION)
    body = reply.json()
    assert reply.status_code == 200
    assert re.fullmatch(r"cmpl-[0-9a-f]{32}", body["id"])
    assert body["object"] == "text_completion"
    assert body["model"] == "fox"
    assert body["choices"] == [
        {"index": 0, "text": said(live, 6), "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    prompt = len(live.tokenizer.encode("Tell me"))
    assert body["usage"] == {"prompt_tokens": prompt, "total_tokens": prompt + 6, "completion_tokens": 6}
    assert set(body) == {"id", "object", "created", "model", "choices", "usage"}


def test_completion_defaults(http: httpx.Client, live: Live) -> None:
    http.post("/v1/completions", json={"prompt": "x"})
    sampling = live.client.added[0].sampling
    assert (sampling.max_tokens, sampling.temperature) == (16, 1.0)


def test_a_default_of_tokens_shrinks_to_what_the_context_has_left(http: httpx.Client, live: Live) -> None:
    reply = http.post("/v1/completions", json={"prompt": [5] * 505})
    assert reply.json()["usage"]["completion_tokens"] == 512 - 505


def test_chat_default_is_the_rest_of_the_context(http: httpx.Client, live: Live) -> None:
    live.client.ends = True
    reply = http.post("/v1/chat/completions", json={"messages": CHAT["messages"]})
    request = live.client.added[0]
    assert request.sampling.max_tokens == 512 - len(request.prompt_ids)
    assert reply.json()["choices"][0]["message"]["content"] == STORY
    assert reply.json()["choices"][0]["finish_reason"] == "stop"


def test_sampling_reaches_the_engine(http: httpx.Client, live: Live) -> None:
    given = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.2,
        "frequency_penalty": 0.3, "seed": 11, "max_tokens": 3, "min_tokens": 2, "stop": ["zzz"], "stop_token_ids": [1],
        "ignore_eos": True, "include_stop_str_in_output": True, "skip_special_tokens": False,
    }  # fmt: skip
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT), ("/generate", {"prompt": "x"})):
        assert http.post(path, json={**body, **given}).status_code == 200
    for request in live.client.added:
        for name, value in given.items():
            sent = getattr(request.sampling, name)
            assert (list(sent) if isinstance(sent, tuple) else sent) == value


def test_lists_of_prompts_give_choices_in_order(http: httpx.Client, live: Live) -> None:
    ids = live.tokenizer.encode("Tell me")
    for prompt, count in ((["a", "b", "c"], 3), (ids, 1), ([ids, [1, 2]], 2)):
        body = http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 4}).json()
        assert [c["index"] for c in body["choices"]] == list(range(count))
        assert {c["text"] for c in body["choices"]} == {said(live, 4)}
        assert body["usage"]["completion_tokens"] == 4 * count
    assert [r.prompt_ids for r in live.client.added[-2:]] == [tuple(ids), (1, 2)]


def test_streamed_choices_carry_their_index(http: httpx.Client, live: Live) -> None:
    reply = http.post("/v1/completions", json={"prompt": ["a", "b", "c"], "max_tokens": 4, "stream": True})
    chunks = events(reply.text)[:-1]
    for index in range(3):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(c["text"] for c in mine) == said(live, 4)
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == ["length"]


def test_completion_stream(http: httpx.Client, live: Live) -> None:
    body = {**COMPLETION, "stream": True, "stream_options": {"include_usage": True}}
    reply = http.post("/v1/completions", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = events(reply.text)
    assert done == "[DONE]"
    assert "".join(c["choices"][0]["text"] for c in chunks) == said(live, 6)
    assert [c["choices"][0]["finish_reason"] for c in chunks][-1] == "length"
    assert not any(c["choices"][0]["finish_reason"] for c in chunks[:-1])
    assert all("usage" not in c for c in chunks)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 6
    assert len({c["id"] for c in [*chunks, usage]}) == 1


def test_chat_stream(http: httpx.Client, live: Live) -> None:
    reply = http.post("/v1/chat/completions", json={**CHAT, "stream": True})
    first, *middle, last, done = events(reply.text)
    assert done == "[DONE]"
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", first["id"])
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert "".join(c["choices"][0]["delta"]["content"] for c in middle) == said(live, 6)
    assert all(set(c["choices"][0]["delta"]) == {"content"} for c in middle)
    assert last["choices"] == [
        {"index": 0, "delta": {}, "finish_reason": "length", "stop_reason": None, "logprobs": None}
    ]
    assert set(last) == {"id", "object", "created", "model", "choices"}


def test_usage_with_every_chunk(http: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    reply = http.post("/v1/chat/completions", json={**CHAT, "stream": True, "stream_options": options})
    counts = [c["usage"]["completion_tokens"] for c in events(reply.text)[:-1]]
    assert counts == sorted(counts)
    assert counts[-1] == 6


def test_stop_string_ends_a_stream(http: httpx.Client, live: Live, until: Any) -> None:
    body = {"prompt": "x", "max_tokens": 40, "stop": [" time, a sm"], "stream": True}
    *chunks, _ = events(http.post("/v1/completions", json=body).text)
    assert "".join(c["choices"][0]["text"] for c in chunks) == " Once upon a"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"][0]["stop_reason"] == " time, a sm"
    until(lambda: live.client.aborted == [live.client.added[0].id])


def test_chat_messages_reach_the_template(http: httpx.Client, live: Live) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], "name": "kim"},
        {"role": "assistant", "content": "A fox", "refusal": None, "tool_calls": [], "annotations": None, "audio": None},
    ]
    http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
    text = live.tokenizer.decode(live.client.added[0].prompt_ids, skip_special_tokens=False)
    assert text == "<|system|>Be kind.<|end|><|user|>one\ntwo<|end|><|assistant|>A fox<|end|><|assistant|>"
    body = {"messages": messages, "max_tokens": 1, "continue_final_message": True}
    http.post("/v1/chat/completions", json=body)
    text = live.tokenizer.decode(live.client.added[1].prompt_ids, skip_special_tokens=False)
    assert text.endswith("<|assistant|>A fox")


def test_failure_before_the_first_token_has_its_status(http: httpx.Client, live: Live) -> None:
    for path in ("/v1/completions", "/generate"):
        reply = http.post(path, json={"prompt": "x", "max_tokens": 5000, "stream": True})
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "input_tokens"


def test_failure_after_the_first_token_is_an_event(http: httpx.Client, live: Live) -> None:
    live.client.failing = True
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        reply = http.post(path, json={**body, "stream": True})
        *chunks, error, done = events(reply.text)
        assert reply.status_code == 200
        assert done == "[DONE]"
        assert error["error"]["code"] == 500
        assert error["error"]["message"] == "The scripted engine was told to fail."
        assert not any(c["choices"][0]["finish_reason"] for c in chunks)
        whole = http.post(path, json=body)
        assert (whole.status_code, whole.json()["error"]["type"]) == (500, "InternalServerError")


def test_models(http: httpx.Client) -> None:
    body = http.get("/v1/models").json()
    assert [m["id"] for m in body["data"]] == ["fox", "bear"]
    assert body["data"][0]["max_model_len"] == 512
    assert body["data"][0]["object"] == "model"
    assert http.get("/v1/models/bear").json()["id"] == "bear"
    assert http.get("/v1/models/wolf").status_code == 404


def test_tokenize_and_back(http: httpx.Client, live: Live) -> None:
    text = "Tell me a störy\r\n🦊"
    body = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert body["tokens"] == live.tokenizer.encode(text)
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert body["max_model_len"] == 512
    assert http.post("/detokenize", json={"tokens": body["tokens"]}).json() == {"prompt": text}
    chat = http.post("/tokenize", json={"messages": CHAT["messages"]}).json()
    http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 1})
    assert tuple(chat["tokens"]) == live.client.added[0].prompt_ids


def test_openai_client(live: Live) -> None:
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
    assert [m.id for m in client.models.list()] == ["fox", "bear"]
    assert client.models.retrieve("fox").id == "fox"
    whole = client.completions.create(model="fox", prompt="x", max_tokens=6)
    assert whole.choices[0].text == said(live, 6)
    assert whole.usage is not None and whole.usage.completion_tokens == 6
    pieces = list(client.completions.create(model="fox", prompt="x", max_tokens=6, stream=True))
    assert "".join(p.choices[0].text for p in pieces) == said(live, 6)
    chat = client.chat.completions.create(model="bear", messages=[{"role": "user", "content": "x"}], max_completion_tokens=6)
    assert chat.choices[0].message.content == said(live, 6)
    assert not chat.choices[0].message.tool_calls
    again = [{"role": "user", "content": "x"}, chat.choices[0].message.model_dump(), {"role": "user", "content": "y"}]
    stream = client.chat.completions.create(
        model="fox", messages=again, max_tokens=6, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == said(live, 6)
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 6
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="wolf", prompt="x")
    with pytest.raises(openai.BadRequestError, match="suffix"):
        client.completions.create(model="fox", prompt="x", suffix="y")


def test_openai_client_asks_for_several_texts(live: Live) -> None:
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
    messages: Any = [{"role": "user", "content": "x"}]
    whole = client.completions.create(model="fox", prompt=["x", "y z"], max_tokens=6, n=3, seed=5)
    assert [(c.index, c.text) for c in whole.choices] == [(i, said(live, 6)) for i in range(6)]
    added = live.client.added
    assert [r.sample_index for r in added] == [0, 1, 2] * 2 and {r.sampling.seed for r in added} == {5}
    assert [r.fork_of for r in added] == [None, added[0].id, added[0].id, None, added[3].id, added[3].id]
    assert whole.usage is not None and whole.usage.completion_tokens == 36
    assert whole.usage.prompt_tokens == len(added[0].prompt_ids) + len(added[3].prompt_ids)
    chat = client.chat.completions.create(model="fox", messages=messages, max_tokens=6, n=2)
    assert [(c.index, c.message.content) for c in chat.choices] == [(i, said(live, 6)) for i in range(2)]
    texts, roles, ends = {0: "", 1: ""}, [], []
    options: Any = {"include_usage": True}
    for chunk in client.chat.completions.create(
        model="fox", messages=messages, max_tokens=6, n=2, stream=True, stream_options=options
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles += [choice.index] if choice.delta.role else []
            ends += [choice.index] if choice.finish_reason else []
    assert texts == {0: said(live, 6), 1: said(live, 6)} and sorted(roles) == sorted(ends) == [0, 1]
    assert chunk.usage is not None and chunk.usage.completion_tokens == 12
    assert chunk.usage.prompt_tokens == chat.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match="n must be 1 at temperature 0"):
        client.completions.create(model="fox", prompt="x", n=2, temperature=0)


def test_defaults_of_the_model(live: Live) -> None:
    """A request's own values beat them; the native route has none."""
    state, before = live.app.state, live.app.state.serving
    state.serving = replace(before, sampling_defaults={"temperature": 0.6, "top_k": 20})
    try:
        with httpx.Client(base_url=live.url) as http:
            for path, body in (("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", CHAT)):
                http.post(path, json=body)
                http.post(path, json={**body, "temperature": 1.5, "top_k": 0})
            http.post("/generate", json={"prompt": "x"})
    finally:
        state.serving = before
    found = [(r.sampling.temperature, r.sampling.top_k) for r in live.client.added]
    assert found == [(0.6, 20), (1.5, 0)] * 2 + [(0.0, 0)]


def test_logprobs(http: httpx.Client, live: Live) -> None:
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
    ids = live.tokenizer.encode(STORY)[:6]
    texts = [live.tokenizer.decode([token]) for token in ids]
    top = {live.tokenizer.decode([40 + i]): value for i, value in enumerate((-1.0, -9999.0))}
    done = client.completions.create(model="fox", prompt="x", max_tokens=6, logprobs=2).choices[0].logprobs
    assert done is not None and done.tokens == texts and done.token_logprobs == [-0.5] * 6
    assert done.text_offset == [sum(map(len, texts[:i])) for i in range(6)]
    assert done.top_logprobs == [{**top, text: -0.5} for text in texts]
    offsets = []
    for chunk in client.completions.create(model="fox", prompt="x", max_tokens=6, logprobs=0, stream=True):
        if (found := chunk.choices[0].logprobs) is not None:
            offsets += found.text_offset or []
            assert [list(t) for t in found.top_logprobs or []] == [[text] for text in found.tokens or []]
    assert offsets == done.text_offset
    messages: Any = [{"role": "user", "content": "x"}]
    ask: dict[str, Any] = {"model": "fox", "messages": messages, "max_tokens": 6, "logprobs": True, "top_logprobs": 2}
    chat = client.chat.completions.create(**ask).choices[0].logprobs
    assert chat is not None and chat.content is not None
    pieces = [c.choices[0].logprobs for c in client.chat.completions.create(**ask, stream=True)]
    assert [t for piece in pieces if piece for t in piece.content or []] == chat.content
    assert [(t.token, t.logprob) for t in chat.content] == [(text, -0.5) for text in texts]
    assert b"".join(bytes(t.bytes or []) for t in chat.content).decode() == said(live, 6)
    assert [[(o.token, o.logprob) for o in t.top_logprobs] for t in chat.content] == [list(top.items())] * 6
    named = http.post("/v1/completions", json={**COMPLETION, "logprobs": 1, "return_tokens_as_token_ids": True}).json()
    assert named["choices"][0]["logprobs"]["tokens"] == [f"token_id:{token}" for token in ids]
    for path, more, name in (
        ("/v1/completions", {**COMPLETION, "logprobs": 21}, "logprobs"),
        ("/v1/completions", {**COMPLETION, "logprobs": True}, "logprobs"),
        ("/v1/chat/completions", {**CHAT, "top_logprobs": 2}, "top_logprobs"),
        ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 21}, "logprobs"),
    ):
        reply = http.post(path, json=more)
        assert reply.status_code == 400 and reply.json()["error"]["param"] == name
    for path, more in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        assert http.post(path, json={**more, "logprobs": False}).json()["choices"][0]["logprobs"] is None


def test_token_ids_come_back(http: httpx.Client, live: Live) -> None:
    story, asked = live.tokenizer.encode(STORY)[:6], {"return_token_ids": True, "n": 2}
    whole = http.post("/v1/completions", json={**COMPLETION, **asked}).json()
    prompt = list(live.client.added[0].prompt_ids)
    assert [(c["token_ids"], c["prompt_token_ids"]) for c in whole["choices"]] == [(story, prompt)] * 2
    chat = http.post("/v1/chat/completions", json={**CHAT, **asked}).json()
    chat_prompt = list(live.client.added[2].prompt_ids)
    assert chat["prompt_token_ids"] == chat_prompt and [c["token_ids"] for c in chat["choices"]] == [story] * 2
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        chunks = events(http.post(path, json={**body, **asked, "stream": True}).text)[:-1]
        found: dict[int, list[int]] = {0: [], 1: []}
        prompts = [c["prompt_token_ids"] for c in chunks if "prompt_token_ids" in c]
        for choice in (choice for c in chunks for choice in c["choices"]):
            found[choice["index"]] += choice.get("token_ids", [])
            prompts += [choice["prompt_token_ids"]] if "prompt_token_ids" in choice else []
        assert found == {0: story, 1: story}
        assert prompts == ([prompt] * 2 if body is COMPLETION else [chat_prompt])
    plain = http.post("/v1/completions", json=COMPLETION).text + http.post("/v1/chat/completions", json=CHAT).text
    assert "token_ids" not in plain


def test_a_prompt_is_echoed(http: httpx.Client, live: Live) -> None:
    body = {"prompt": ["Tell me", "A fox"], "max_tokens": 6, "n": 2, "echo": True}
    expected = [f"{prompt}{said(live, 6)}" for prompt in ("Tell me", "Tell me", "A fox", "A fox")]
    assert [c["text"] for c in http.post("/v1/completions", json=body).json()["choices"]] == expected
    texts = [""] * 4
    for chunk in events(http.post("/v1/completions", json={**body, "stream": True}).text)[:-1]:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == expected
    ids = live.tokenizer.encode("Tell me")
    assert http.post("/v1/completions", json={**body, "prompt": ids, "n": 1}).json()["choices"][0]["text"] == expected[0]


def test_prompts_are_cut(http: httpx.Client, live: Live) -> None:
    def asked(**more: Any) -> tuple[int, ...]:
        assert http.post("/v1/completions", json={"prompt": list(range(20, 80)), "max_tokens": 5, **more}).status_code == 200
        ids: tuple[int, ...] = live.client.added.pop().prompt_ids
        return ids

    assert asked(truncate_prompt_tokens=3) == (77, 78, 79)
    assert asked(truncate_prompt_tokens=3, truncation_side="right") == (20, 21, 22)
    assert asked(truncate_prompt_tokens=100) == asked() == tuple(range(20, 80))
    most = live.client.info.max_model_len
    long = list(range(20, 120)) * (most // 100 + 1)
    assert len(asked(prompt=long, truncate_prompt_tokens=-1)) == most - 5
    http.post("/v1/chat/completions", json={**CHAT, "truncate_prompt_tokens": 4})
    assert len(live.client.added.pop().prompt_ids) == 4
    for more, name in (
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": most + 1}, "truncate_prompt_tokens"),
        ({"truncation_side": "left"}, "truncation_side"),
    ):
        reply = http.post("/v1/completions", json={"prompt": "x", **more})
        assert reply.status_code == 400 and reply.json()["error"]["param"] == name


def test_the_usage_tells_what_was_cached_where_it_is_asked_to(live: Live) -> None:
    state, before = live.app.state, live.app.state.serving
    config = replace(before.config, server=replace(before.config.server, enable_prompt_tokens_details=True))
    state.serving = replace(before, config=config)
    try:
        usage = httpx.post(f"{live.url}/v1/completions", json={**COMPLETION, "n": 2}).json()["usage"]
    finally:
        state.serving = before
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0} and usage["completion_tokens"] == 12
    assert "prompt_tokens_details" not in httpx.post(f"{live.url}/v1/completions", json=COMPLETION).json()["usage"]


def test_openai_client_names_tokens(live: Live) -> None:
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
    more = {"allowed_token_ids": [5, 6], "bad_words": ["fox", " bear "]}
    client.completions.create(model="fox", prompt="x", max_tokens=2, logit_bias={"5": 1, "7": -100.0}, extra_body=more)
    messages: Any = [{"role": "user", "content": "x"}]
    client.chat.completions.create(model="fox", messages=messages, max_tokens=2, logit_bias={"7": -3}, extra_body=more)
    for request, bias in zip(live.client.added, (((5, 1.0), (7, -100.0)), ((7, -3.0),)), strict=True):
        asked = request.sampling
        assert asked.logit_bias == bias and asked.allowed_token_ids == (5, 6) and asked.bad_words == ("fox", " bear ")
        assert all(asked.bad_word_ids) and len(asked.bad_word_ids) >= 2


def test_openai_client_gets_the_error_of_a_stream(live: Live) -> None:
    live.client.failing = True
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.APIError, match="told to fail"):
        list(client.chat.completions.create(model="fox", messages=[{"role": "user", "content": "x"}], stream=True))


def test_openai_async_client(live: Live) -> None:
    async def talk() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:

            async def one(num_tokens: int) -> str:
                stream = await client.chat.completions.create(
                    model="fox", messages=[{"role": "user", "content": "x"}], max_tokens=num_tokens, stream=True
                )
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            whole = await client.completions.create(model="fox", prompt="x", max_tokens=4)
            return [whole.choices[0].text, *await asyncio.gather(*(one(n) for n in range(1, 25)))]

    whole, *texts = asyncio.run(talk())
    assert whole == said(live, 4)
    for num_tokens, text in enumerate(texts, 1):
        script = live.tokenizer.encode(STORY)
        assert text == live.tokenizer.decode([script[i % len(script)] for i in range(num_tokens)])
