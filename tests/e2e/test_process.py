"""The server as a process: it starts with a sentence or not at all, drains, and dies honestly."""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import httpx
import pytest
from live_server import LiveServer, command, serve

LONG = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True}


def follow(live: LiveServer, bodies: list[dict], path: str = "/generate") -> tuple[list[threading.Thread], list[str]]:
    """Start one reader for each body, and wait until each has got something."""
    got = [""] * len(bodies)

    def read(i: int) -> None:
        with httpx.stream("POST", live.url + path, json=bodies[i], timeout=120) as reply:
            for piece in reply.iter_text():
                got[i] += piece

    threads = [threading.Thread(target=read, args=(i,), daemon=True) for i in range(len(bodies))]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while not all(got) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all(got)
    return threads, got


def test_streams_go_on_when_the_engine_is_killed() -> None:
    """In batch-invariant mode with the very texts of a run without a kill; nobody reads of it."""
    wanted = [
        {**LONG, "temperature": 0},
        {**LONG, "seed": 5},
        {"prompt": "A dog. " * 120, "max_tokens": 300, "ignore_eos": True, "seed": 6},
        {"prompt": "Tell me", "max_tokens": 200, "seed": 7, "structured_outputs": {"regex": "(very )*big"}},
    ]
    with serve("--batch-invariant", "--max-num-batched-tokens", "256") as live:
        said = [httpx.post(live.url + "/v1/completions", json=body, timeout=120).json()["choices"][0] for body in wanted]
        for _ in range(2):
            threads, got = follow(live, [{**body, "stream": True, "logprobs": 1} for body in wanted], "/v1/completions")
            os.kill(live.engine_pid, signal.SIGKILL)
            for thread in threads:
                thread.join(60)
            for text, whole in zip(got, said, strict=True):
                events = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
                assert events[-1] == "[DONE]"
                chunks = [json.loads(event)["choices"][0] for event in events[:-1]]
                assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
                assert chunks[-1]["finish_reason"] == whole["finish_reason"]
                offsets = [o for chunk in chunks if chunk["logprobs"] for o in chunk["logprobs"]["text_offset"]]
                assert offsets == sorted(offsets)
        assert httpx.get(live.url + "/ready").status_code == 200
        live.wait_idle()


def test_engines_that_die_too_often_end_the_server_with_an_error() -> None:
    with serve("--max-engine-restarts", "1") as live:
        threads, native = follow(live, [LONG] * 4)
        more, openai = follow(live, [{**LONG, "stream": True}] * 2, "/v1/completions")
        os.kill(live.engine_pid, signal.SIGKILL)
        time.sleep(1)
        os.kill(live.engine_pid, signal.SIGKILL)
        for thread in (*threads, *more):
            thread.join(30)
        assert live.process.wait(timeout=30) not in (0, None)
    for text in native:
        assert "event: error\n" in text
    for text in openai:
        events = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["error"]["code"] == 500
        assert not any(json.loads(e)["choices"][0].get("finish_reason") for e in events[:-2])


def test_sigterm_lets_running_streams_finish_and_answers_503_meanwhile() -> None:
    with serve() as live:
        threads, got = follow(live, [LONG] * 2)
        live.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 30
        while (status := httpx.post(live.url + "/generate", json={"prompt": "x", "max_tokens": 1}).status_code) != 503:
            assert status == 200
            assert time.monotonic() < deadline
        for thread in threads:
            thread.join(60)
        assert live.process.wait(timeout=60) == 0
    assert all("event: error" not in text for text in got)


def test_sigterm_to_the_whole_group_still_drains() -> None:
    """Service managers and terminals signal every process of the group."""
    with serve() as live:
        threads, got = follow(live, [LONG])
        for pid in (live.engine_pid, live.process.pid):
            os.kill(pid, signal.SIGTERM)
        threads[0].join(60)
        assert live.process.wait(timeout=60) == 0
    assert "event: error" not in got[0]


def test_no_engine_outlives_its_server() -> None:
    with serve() as live:
        engine = live.engine_pid
        live.process.kill()
        live.process.wait()
        deadline = time.monotonic() + 20
        while Path(f"/proc/{engine}/stat").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not Path(f"/proc/{engine}/stat").exists()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_blocks_within_two_steps(stream: bool) -> None:
    with serve() as live:
        with httpx.Client(base_url=live.url, timeout=0.5) as client:
            try:
                with client.stream("POST", "/v1/completions", json={**LONG, "stream": stream}) as reply:
                    next(reply.iter_raw())
            except httpx.ReadTimeout:
                assert not stream
        metrics = live.wait_idle()
        assert metrics["total_requests"]["abort"] == 1  # type: ignore[index]
        assert metrics["total_tokens_generated"] < 900


def broken_folder(kind: str, model: Path, folder: Path) -> str:
    """A model folder that is wrong in one way; what the sentence about it must say."""
    if kind == "missing":
        return "no folder"
    shutil.copytree(model, folder)
    weights = folder / "model.safetensors"
    if kind == "no weights":
        weights.unlink()
        return "safetensors"
    if kind == "pickles":
        weights.rename(folder / "pytorch_model.bin")
        return "pickle"
    if kind == "architecture":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architectures": ["FancyForCausalLM"]}))
        return "FancyForCausalLM"
    if kind == "config":
        (folder / "config.json").write_text("{")
        return "config.json"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2] if kind == "truncated" else data[:4])
    return "truncated|shorter|incomplete|broken|cut"


@pytest.mark.parametrize("kind", ["missing", "no weights", "pickles", "architecture", "config", "truncated", "stub"])
def test_a_broken_model_folder_is_one_sentence_and_exit_code_2(kind: str, bundled_model: Path, tmp_path: Path) -> None:
    says = broken_folder(kind, bundled_model, tmp_path / "model")
    done = subprocess.run(command("serve", str(tmp_path / "model"), "--port", "0"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    message = [line for line in done.stderr.splitlines() if line.startswith("mini-vllm: error:")]
    assert len(message) == 1, done.stderr
    assert re.search(says, message[0]), message
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_context_that_does_not_fit_the_cache_is_refused_with_the_remedy() -> None:
    args = command("serve", "--port", "0", "--num-gpu-blocks-override", "4", "--max-model-len", "1024")
    done = subprocess.run(args, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "max-model-len" in done.stderr
    assert "Traceback" not in done.stderr
