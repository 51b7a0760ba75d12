"""Rules on the repository: what is in it, how large it is, and that the pages say what the program does."""

import re
from pathlib import Path

import pytest

from minivllm.cli.main import COMMANDS
from minivllm.cli.options import markdown

MAX_FILE_BYTES, MAX_REPOSITORY_BYTES = 22 * 10**6, 45 * 10**6
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib", ".dill"}
BINARY_SUFFIXES = {".safetensors", ".png", ".ico", ".woff2"}
ASSET_SUFFIXES = {".json", ".safetensors", ".md", ".jinja", ".txt"}
# Written in pieces, so that this file does not hold what it looks for.
MACHINE_PATHS = re.compile("|".join([r"(?<![\w.])/wo" + "rk/", r"(?<![\w.])/ro" + "ot/", "/home/" + r"\w+/"]))


def test_files_are_small_enough(project_files: list[Path]) -> None:
    sizes = {f: f.stat().st_size for f in project_files}
    assert [f"{f}: {n}" for f, n in sizes.items() if n > MAX_FILE_BYTES] == []
    assert sum(sizes.values()) < MAX_REPOSITORY_BYTES


def test_no_pickles_and_no_unknown_binaries(project_files: list[Path]) -> None:
    assert [str(f) for f in project_files if f.suffix.lower() in PICKLE_SUFFIXES] == []
    texts = [f for f in project_files if f.suffix not in BINARY_SUFFIXES]
    assert [str(f) for f in texts if b"\0" in f.read_bytes()] == []


def test_assets_hold_models_and_nothing_else(project_files: list[Path], repo: Path) -> None:
    assets = [f for f in project_files if f.is_relative_to(repo / "minivllm" / "assets")]
    assert assets
    assert [str(f) for f in assets if f.suffix not in ASSET_SUFFIXES] == []


def test_no_path_of_a_developers_machine(project_files: list[Path]) -> None:
    found = []
    for file in project_files:
        if file.suffix not in BINARY_SUFFIXES:
            text = file.read_text(encoding="utf-8", errors="replace")
            found += [f"{file}: {m[0]}" for m in MACHINE_PATHS.finditer(text)]
    assert found == []


def test_the_gate_sees_a_machine_path() -> None:
    assert MACHINE_PATHS.search("open('/wo" + "rk/x')")
    assert MACHINE_PATHS.search("see /home/" + "somebody/model")
    assert not MACHINE_PATHS.search("a path inside a repository: net" + "/wo" + "rk/flow")


# ------------------------------------------------------------------------------------------------------------------ pages


def test_architecture_page_names_every_folder(repo: Path) -> None:
    page = (repo / "docs" / "architecture.md").read_text(encoding="utf-8")
    folders = [p.parent.relative_to(repo / "minivllm").as_posix() for p in (repo / "minivllm").rglob("__init__.py")]
    assert [f for f in folders if f != "." and f"{f}/" not in page] == []


@pytest.fixture(scope="module")
def readme(repo: Path) -> str:
    return (repo / "README.md").read_text(encoding="utf-8")


def test_readme_holds_the_options_as_they_are(readme: str) -> None:
    match = re.search(r"<!-- options -->\n(.*?)<!-- /options -->", readme, re.DOTALL)
    assert match is not None, "README.md has no <!-- options --> ... <!-- /options -->"
    wanted = markdown()
    assert match[1].strip() == wanted, "python -m minivllm.cli.options prints the table as it should stand in README.md"


def test_readme_commands_exist(readme: str, repo: Path) -> None:
    blocks = "\n".join(re.findall(r"^ *```(?:bash|sh|console|shell)?\n(.*?)^ *```", readme, re.DOTALL | re.MULTILINE))
    targets = set(re.findall(r"^([a-z][\w-]*):", (repo / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    made = set(re.findall(r"\bmake ([a-z][\w-]*)", blocks))
    ran = set(re.findall(r"\bmini-vllm ([a-z]\w*)", blocks))
    assert {"serve", "test"} <= made <= targets
    assert ran <= set(COMMANDS)
    assert "curl" in blocks
