"""``generate``: where prompts come from, what a line may hold, what is written."""

import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from minivllm.cli.generate import DEFAULT_MAX_TOKENS, token_bar
from minivllm.cli.main import main
from minivllm.types import SamplingParams


@dataclass
class Spoken:
    """What the fake engine was asked. Written by the fake."""

    options: dict[str, Any] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    sampling: list[SamplingParams] = field(default_factory=list)
    closed: bool = False


@pytest.fixture
def spoken(monkeypatch: pytest.MonkeyPatch) -> Spoken:
    """An ``LLM`` that answers each prompt with itself in capitals."""
    spoken = Spoken()

    @dataclass
    class Completion:
        prompt: str
        text: str
        prompt_ids: tuple[int, ...] = (1, 2)
        token_ids: tuple[int, ...] = (3,)
        finish_reason: str = "stop"
        stop_reason: None = None
        logprobs: tuple[()] = ()

    class LLM:
        def __init__(self, **options: Any) -> None:
            spoken.options = options

        def generate(self, prompts: list[str], sampling: list[SamplingParams], progress: object) -> list[Completion]:
            spoken.prompts, spoken.sampling = prompts, sampling
            return [Completion(p, p.upper()) for p in prompts]

        def close(self) -> None:
            spoken.closed = True

    module = type(sys)("minivllm.llm")
    module.LLM = LLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "minivllm.llm", module)
    return spoken


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Give the command a piped stdin."""
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


def written(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_prompts_of_the_command_line(spoken: Spoken, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "one", "zwölf", "--temperature", "0", "--stop", "a", "b", "--max_num_seqs", "3"]
    assert main(argv) == 0
    assert spoken.prompts == ["one", "zwölf"]
    assert spoken.sampling == [SamplingParams(temperature=0, stop=("a", "b"), max_tokens=DEFAULT_MAX_TOKENS)] * 2
    assert spoken.options["max_num_seqs"] == 3
    assert spoken.closed
    first, second = written(capsys)
    assert first == {
        "prompt": "one", "text": "ONE", "finish_reason": "stop", "stop_reason": None,
        "num_prompt_tokens": 2, "num_output_tokens": 1,
    }  # fmt: skip
    assert second["text"] == "ZWÖLF"


def test_lines_of_stdin(spoken: Spoken, typed: Callable[[str], None]) -> None:
    typed("one\r\n\n  two \n{three\n")
    assert main(["generate", "--max-tokens", "7"]) == 0
    assert spoken.prompts == ["one", "  two ", "{three"]
    assert {s.max_tokens for s in spoken.sampling} == {7}


def test_jsonl_lines_bring_their_own_sampling(spoken: Spoken, typed: Callable[[str], None]) -> None:
    typed('{"prompt": "one", "max_tokens": 2, "seed": 5, "stop": "x", "logit_bias": {"7": -3}}\n{"prompt": "two\\nlines"}\n')
    assert main(["generate", "--top-p", "0.5"]) == 0
    assert spoken.prompts == ["one", "two\nlines"]
    first, second = spoken.sampling
    assert (first.max_tokens, first.seed, first.stop, first.top_p) == (2, 5, ("x",), 0.5)
    assert first.logit_bias == ((7, -3.0),) and second.logit_bias == ()
    assert (second.max_tokens, second.seed, second.top_p) == (DEFAULT_MAX_TOKENS, None, 0.5)


def test_files_in_and_out(spoken: Spoken, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n', encoding="utf-8")
    assert main(["generate", "--file", str(tmp_path / "p.jsonl"), "-o", str(tmp_path / "out.jsonl")]) == 0
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "out.jsonl").read_text())["text"] == "ONE"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "fine"}\n\n{"prompt": 3}', 'stdin line 3 must be a JSON object with a "prompt" text.'),
        ('{"prompt": "fine"}\n{"text": "x"}', "stdin line 2 must be"),
        ('{"prompt": "fine"}\n{"prompt": ', "stdin line 2 is not JSON"),
        ('{"prompt": "x", "temprature": 1}', "stdin line 1: there is no sampling field 'temprature'"),
        ('{"prompt": "x", "temperature": "hot"}', "stdin line 1: temperature: Expected `float`, got `str`."),
        ('{"prompt": "x", "top_p": 0}', "stdin line 1: top_p must be over 0"),
        ("\n \n", "There is no prompt"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_loaded(
    spoken: Spoken, typed: Callable[[str], None], capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    typed(text)
    assert main(["generate"]) == 2
    assert words in capsys.readouterr().err
    assert spoken.options == {}


def test_a_jsonl_file_is_json_on_every_line(spoken: Spoken, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text('plain\n{"prompt": "x"}\n')
    assert main(["generate", "-f", str(tmp_path / "p.jsonl")]) == 2
    assert "p.jsonl line 1 is not JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [(["x", "--file", "y"], "not both"), (["--file", "./nowhere"], "cannot be read"), (["x", "-o", "./no/where"], "--output")],
)
@pytest.mark.usefixtures("spoken")
def test_files_that_cannot_be_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, argv: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", *argv]) == 2
    assert words in capsys.readouterr().err


def test_no_bar_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with token_bar(10) as progress:
        assert progress is None
    assert capsys.readouterr().err == ""


def test_a_bar_counts_tokens_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stderr = Terminal()
    monkeypatch.setattr("sys.stderr", stderr)
    with token_bar(10) as progress:
        assert progress is not None
        progress(4)
        progress(6)
    assert "10.0/10.0" in stderr.getvalue()
    assert "tokens/s" in stderr.getvalue()


@pytest.mark.slow
def test_the_bundled_model_completes(bundled_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--max-tokens 4 --temperature 0 --ignore-eos --num-threads 1 --kv-cache-memory-bytes 32M"
    assert main(["generate", "Once upon a time", "Tom", *options.split()]) == 0
    lines = written(capsys)
    assert [line["num_output_tokens"] for line in lines] == [4, 4]
    assert [line["finish_reason"] for line in lines] == ["length", "length"]


def test_steps_can_be_recorded(spoken: Spoken, tmp_path: Path) -> None:
    assert main(["generate", "x", "--record-steps", str(tmp_path / "steps")]) == 0
    assert spoken.options["record_steps"] == str(tmp_path / "steps")
