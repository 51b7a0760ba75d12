"""The program as a whole: commands, exit codes, sentences instead of tracebacks."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from minivllm import __version__
from minivllm.cli import main as main_module
from minivllm.cli.main import COMMANDS, main
from minivllm.cli.serve import check_port
from minivllm.errors import PortInUse


def mini_vllm(*argv: str, stdin: str = "", timeout: int = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "minivllm", *argv], input=stdin, capture_output=True, text=True, timeout=timeout, check=False
    )


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    for name, (_, text) in COMMANDS.items():
        assert f"  {name} " in page
        assert text in page


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mini-vllm {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    done = mini_vllm(command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: mini-vllm " + command)


@pytest.mark.parametrize("kind", ["throughput", "latency", "serve"])
def test_every_benchmark_has_help(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", kind, "--help"])
    assert "--num-" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nonsense"], "no command 'nonsense'"),
        (["serve", "--prot", "1"], "did you mean --port?"),
        (["serve", "some", "thing"], "one argument too many"),
        (["serve", "--model", "./nowhere", "elsewhere"], "named twice"),
        (["serve", "--model", "./nowhere", "--port", "0"], "There is no folder ./nowhere"),
        (["generate", "x", "--model", "./nowhere"], "There is no folder ./nowhere"),
        (["generate", "x", "--temperature", "9"], "temperature must be a number from 0 to 2"),
        (["chat", "./nowhere"], "There is no folder ./nowhere"),
        (["bench", "nothing"], "no benchmark 'nothing'"),
        (["bench", "serve", "--goodput", "speed:3"], "--goodput takes"),
        (["bench", "serve", "--percentile-metrics", "x"], "--percentile-metrics"),
        (["bench", "serve", "--request-rate", "0"], "'0' is not a number over 0"),
        (["bench", "serve", "--num-prompts", "0"], "whole number of at least 1"),
        (["bench", "latency", "--batch-size", "-1"], "--batch-size"),
        (["models", "fetch"], "models fetch NAME"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("mini-vllm: error: ")
    assert words in said
    assert said.count("\n") == 1


def test_no_command_prints_the_usage_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().out


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(words: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(main_module, "_dispatch", interrupted)
    assert main(["serve"]) == 130


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    code = "import sys, time; time.sleep(0.3)\nfrom minivllm.cli.main import main; sys.exit(main(['--help']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(30) == 141
    assert said == b""


def test_a_port_in_use_is_refused_before_the_model_is_looked_for() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = mini_vllm("serve", "--port", port, "--model", "./nowhere")
    assert done.returncode == 2
    assert done.stderr == (
        f"mini-vllm: error: Cannot listen on 127.0.0.1:{port}: it is in use; choose another --port or --host.\n"
    )


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(PortInUse, match="not one of this machine's"):
        check_port("192.0.2.1", 8000)
    check_port("127.0.0.1", 0)


@pytest.mark.slow
def test_serve_serves_the_bundled_model_until_it_is_told_to_stop(bundled_model: Path) -> None:
    """The whole program: start, the printed table and URL, one answer, a load, SIGTERM, exit code 0."""
    process = subprocess.Popen(
        [sys.executable, "-m", "minivllm", "serve", "--port", "0", "--num-threads", "1", "--kv-cache-memory-bytes", "32M"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "MINIVLLM_MAX_NUM_SEQS": "16"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("Serving stories on http://127.0.0.1:"):
                break
        table = "".join(lines)
        for words in ("weights", "workspace", "KV cache size: ", "Maximum concurrency for 1,024 tokens per request: "):
            assert words in table
        url = lines[-1].split()[3]
        load = ["--num-prompts", "6", "--random-input-len", "20", "--random-output-len", "5", "--max-concurrency", "3"]
        report = mini_vllm("bench", "serve", "--base-url", url, *load)
        assert report.returncode == 0, report.stderr
        assert "Successful requests:                     6 " in report.stdout
        assert "Total input tokens:                      120 " in report.stdout
        assert "Total generated tokens:                  30 " in report.stdout
        chat = mini_vllm("chat", "--url", url, "--max-tokens", "5", "--temperature", "0", stdin="Tell me a story\n")
        assert chat.returncode == 0, chat.stderr
        assert chat.stdout.strip()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


def test_what_stays_is_kept_from_the_collector() -> None:
    code = "import gc; from minivllm.cli.serve import spare_the_collector; spare_the_collector(); print(gc.get_freeze_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 1000
