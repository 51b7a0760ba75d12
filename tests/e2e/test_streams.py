"""Many clients at once against the real server: each stream is what the offline engine gives for that request alone."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from live_server import LiveServer, serve
from openai import AsyncOpenAI

from minivllm.llm import LLM
from minivllm.types import SamplingParams

OPENINGS = ("Once upon a time", "One day, a little cat", "Tom had a big red ball", "The sun was", "Lily and her mom")


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with serve("--batch-invariant", "--max-num-seqs", "24") as live:
        yield live


@pytest.fixture(scope="module")
def offline() -> LLM:
    return LLM(batch_invariant=True, num_threads=1, max_num_seqs=8)


def requests() -> list[dict]:
    """64 different requests: greedy and seeded, short and long, with penalties and filters."""
    made = []
    for i in range(64):
        settings: dict = {"max_tokens": 3 + 2 * i, "temperature": 0.0 if i % 3 == 0 else 0.9, "seed": i}
        if i % 4 == 1:
            settings |= {"top_p": 0.9, "presence_penalty": 0.5}
        extra = {"top_k": 20, "min_p": 0.02, "repetition_penalty": 1.1} if i % 5 == 2 else {}
        prompt = f"{OPENINGS[i % 5]} number {i}" if i % 7 else OPENINGS[i % 5]
        made.append({"prompt": prompt, "settings": settings, "extra": extra})
    return made


def offline_texts(llm: LLM, wanted: list[dict]) -> list[str]:
    sampling = [SamplingParams(**r["settings"], **r["extra"], stop=tuple(r.get("stop", ()))) for r in wanted]
    return [c.text for c in llm.generate([r["prompt"] for r in wanted], sampling)]


async def stream(client: AsyncOpenAI, request: dict, leave_after: int | None = None) -> str:
    pieces: list[str] = []
    events = await client.completions.create(
        model="stories", prompt=request["prompt"], stream=True, stop=request.get("stop"), extra_body=request["extra"],
        **request["settings"],
    )  # fmt: skip
    async for event in events:
        pieces.append(event.choices[0].text)
        if leave_after is not None and len(pieces) >= leave_after:
            await events.close()
            break
    return "".join(pieces)


def test_64_streams_at_once_equal_the_offline_texts(server: LiveServer, offline: LLM) -> None:
    wanted = requests()
    whole = offline_texts(offline, wanted)
    # A stop string that begins in one token and ends in another, taken from the text that will come.
    stop_at = next(i for i, r in enumerate(wanted) if r["settings"]["max_tokens"] > 60 and len(whole[i]) > 100)
    wanted[stop_at]["stop"] = [whole[stop_at][51:60]]
    expected = offline_texts(offline, wanted)
    assert expected[stop_at] == whole[stop_at][: whole[stop_at].index(wanted[stop_at]["stop"][0])]
    pieces = [offline.tokenizer.decode([t]) for t in offline.tokenizer.encode(whole[stop_at])]
    assert all(wanted[stop_at]["stop"][0] not in p for p in pieces), "the stop string must span tokens"
    leavers = {i: 2 + i % 5 for i in range(20, 64, 9)}

    async def scene() -> list[str]:
        async with AsyncOpenAI(base_url=server.url + "/v1", api_key="none", timeout=300, max_retries=0) as client:
            return await asyncio.gather(*(stream(client, r, leavers.get(i)) for i, r in enumerate(wanted)))

    before = server.metrics()
    texts = asyncio.run(scene())
    for i, text in enumerate(texts):
        if i in leavers:
            assert expected[i].startswith(text)
        else:
            assert text == expected[i], i
    after = server.wait_idle()
    ended = {k: after["total_requests"][k] - before["total_requests"][k] for k in after["total_requests"]}  # type: ignore[index]
    assert sum(ended.values()) == 64
    assert ended["error"] == 0
    assert ended["abort"] >= 1


def test_non_streaming_and_chat_equal_the_offline_texts(server: LiveServer, offline: LLM) -> None:
    wanted = requests()[::8]
    expected = offline_texts(offline, wanted)
    with httpx.Client(base_url=server.url, timeout=120) as client:
        for request, text in zip(wanted, expected, strict=True):
            body = {"model": "stories", "prompt": request["prompt"], **request["settings"], **request["extra"]}
            assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == text
            native = {"prompt": request["prompt"], **request["settings"], **request["extra"]}
            assert sse_text(client.post("/generate", content=json.dumps(native)).text) == text
        messages = [{"role": "user", "content": "Tell me a story with the words tree, cat and happy."}]
        reply = client.post("/v1/chat/completions", json={"messages": messages, "temperature": 0, "max_tokens": 80}).json()
    rendered = offline.tokenizer.render_chat(messages, add_generation_prompt=True)
    ids = offline.tokenizer.encode(rendered, add_special_tokens=False)
    (completion,) = offline.generate([ids], SamplingParams(temperature=0, max_tokens=80))
    assert reply["choices"][0]["message"]["content"] == completion.text
    assert reply["usage"]["prompt_tokens"] == len(ids)


def sse_text(body: str) -> str:
    """What an event-stream client makes of a native reply."""
    events = [e for e in body.split("\n\n") if e]
    return "".join("\n".join(line.removeprefix("data: ") for line in e.split("\n")) for e in events)


@pytest.fixture(scope="module")
def random_gpt2(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """A GPT-2 of random weights over the real GPT-2 tokenizer: its text is broken in every way that bytes allow."""
    folder = tmp_path_factory.mktemp("gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((shared_data / "tokenizers" / "gpt2" / name).read_bytes())
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 50257, "n_embd": 64, "n_layer": 2,
        "n_head": 4, "n_positions": 512, "bos_token_id": 50256, "eos_token_id": 50256, "activation_function": "gelu_new",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_streams_of_random_bytes_are_whole_characters_and_equal_the_text(random_gpt2: Path) -> None:
    prompts = [f"prompt {i}" for i in range(16)]
    options = {"load_format": "dummy", "dtype": "float32", "batch_invariant": True, "num_threads": 1}
    llm = LLM(str(random_gpt2), **options)
    sampling = [SamplingParams(temperature=2.0, seed=i, max_tokens=150) for i in range(16)]
    completions = llm.generate(prompts, sampling)
    broken = sum("\ufffd" in llm.tokenizer.decode([t]) for c in completions for t in c.token_ids)
    assert broken >= 10, "tokens that end inside a character must occur"

    async def read(client: httpx.AsyncClient, i: int) -> str:
        body = {"prompt": prompts[i], "temperature": 2.0, "seed": i, "max_tokens": 150, "stream": True}
        text = ""
        async with client.stream("POST", "/v1/completions", json=body) as reply:
            async for line in reply.aiter_lines():
                line.encode()  # no lone surrogate
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
        return text

    async def scene(url: str) -> list[str]:
        async with httpx.AsyncClient(base_url=url, timeout=300) as client:
            return await asyncio.gather(*(read(client, i) for i in range(16)))

    with serve(str(random_gpt2), "--load-format", "dummy", "--dtype", "float32", "--batch-invariant") as live:
        texts = asyncio.run(scene(live.url))
    assert texts == [c.text for c in completions]
    assert texts == [llm.tokenizer.decode(c.token_ids) for c in completions]


def test_a_seeded_request_gives_the_same_text_alone_batched_preempted_and_after_a_restart(server: LiveServer) -> None:
    body = {"prompt": "Once upon a time", "temperature": 1.0, "seed": 1234, "max_tokens": 300, "ignore_eos": True}

    def ask(url: str, seed: int = 1234) -> str:
        return str(httpx.post(url + "/v1/completions", json={**body, "seed": seed}, timeout=300).json()["choices"][0]["text"])

    async def crowd(url: str) -> list[str]:
        return await asyncio.gather(*(asyncio.to_thread(ask, url, 1234 if i == 3 else i) for i in range(8)))

    alone = ask(server.url)
    assert asyncio.run(crowd(server.url))[3] == alone
    # Another process, with room for two such sequences at a time.
    with serve("--batch-invariant", "--num-gpu-blocks-override", "66") as restarted:
        assert ask(restarted.url) == alone
        assert asyncio.run(crowd(restarted.url))[3] == alone
        assert restarted.wait_idle()["total_preemptions"] > 0
    assert ask(server.url, seed=99) != alone
