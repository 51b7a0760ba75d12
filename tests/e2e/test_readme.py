"""The README's lines, pasted as they stand."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import LiveServer, serve

ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with serve() as live:
        yield live


def blocks(repo: Path, language: str) -> list[str]:
    """The README's code blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", (repo / "README.md").read_text(), re.DOTALL)


def test_every_curl_line_gets_an_answer(repo: Path, server: LiveServer) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    lines = [b for b in blocks(repo, "bash") if b.startswith("curl")]
    assert len(lines) == 5
    for line in lines:
        done = subprocess.run(
            ["bash", "-c", line.replace(ADDRESS, server.url)], capture_output=True, text=True, timeout=120, check=True
        )
        if "/v1/" in line:
            assert json.loads(done.stdout)["choices"][0]["message"]["content"]
        else:
            assert done.stdout.startswith("data: ")
            assert len(re.findall(r"^data: .+$", done.stdout, re.MULTILINE)) > 10
    watched = re.search(r"watch .*'(curl .*)'", "\n".join(blocks(repo, "bash")))
    assert watched is not None
    done = subprocess.run(["bash", "-c", watched.group(1).replace(ADDRESS, server.url)], capture_output=True, text=True)
    assert json.loads(done.stdout)["total_tokens_generated"] > 100


def test_the_openai_client_prints_a_story(repo: Path, server: LiveServer) -> None:
    (code,) = [b for b in blocks(repo, "python") if "openai" in b]
    done = subprocess.run(
        [sys.executable, "-c", code.replace(ADDRESS, server.url)], capture_output=True, text=True, timeout=120, check=True
    )
    assert len(done.stdout.split()) > 20


def test_the_python_interface_prints_two_stories(repo: Path) -> None:
    (code,) = [b for b in blocks(repo, "python") if "LLM()" in b]
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, timeout=120, check=True)
    assert len(done.stdout.split()) > 40


def test_the_commands_without_a_server_work(repo: Path) -> None:
    (block,) = [b for b in blocks(repo, "bash") if "mini-vllm generate" in b]
    for line in block.strip().split("\n"):
        command = line.replace(".venv/bin/mini-vllm", f"{sys.executable} -m minivllm")
        done = subprocess.run(
            ["bash", "-c", command], cwd=repo, input="Hello!\n/exit\n", capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
