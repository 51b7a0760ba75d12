"""``models``: the bundled ones and those of the hub library's cache."""

from pathlib import Path

import pytest

from minivllm.cli.main import main
from minivllm.cli.models import cached, shown_bytes


def put(cache: Path, name: str, files: dict[str, bytes]) -> None:
    """Lay out a cached repository as the hub library does."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("c" * 40)
    (folder / "blobs").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("c" * 40)
    snapshot.mkdir(parents=True)
    for file, content in files.items():
        blob = folder / "blobs" / file
        blob.write_bytes(content)
        (snapshot / file).symlink_to(blob)


def test_bundled_models_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str], bundled_model: Path) -> None:
    assert main(["models", "--download-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("stories ") and str(bundled_model) in line for line in lines)


def test_cached_models_are_listed_with_their_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "some/model", {"config.json": b"{}", "model.safetensors": bytes(2048 - 2)})
    put(tmp_path, "some/pickles", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    assert [(name, size) for name, size, _ in cached(str(tmp_path))] == [("some/model", 2048)]
    assert main(["models", "list", "--download-dir", str(tmp_path)]) == 0
    assert "some/model" in capsys.readouterr().out


def test_no_cache_is_no_error(tmp_path: Path) -> None:
    assert cached(str(tmp_path / "absent")) == []


def test_fetch_of_a_folder_checks_and_prints_it(bundled_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "fetch", str(bundled_model)]) == 0
    assert capsys.readouterr().out == f"{bundled_model}\n"


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB")])
def test_shown_bytes(size: int, text: str) -> None:
    assert shown_bytes(size) == text
