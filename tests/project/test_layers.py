"""Which file may import which: lower layers only, and never torch where text and requests are handled."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Lowest first; rooms of one layer do not see each other. A name is a folder or a file of the package, the longest that fits.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("types", "config", "model_files", "child", "logs", "heap"),
    ("records",),
    ("kv", "kernels", "text", "observe"),
    ("scheduler", "attention", "layers", "quant", "lora", "sampling", "parallel.comm"),
    ("models", "spec"),
    ("runner",),
    ("parallel.executor", "parallel"),
    ("engine", "door", "beams", "delivery"),
    ("llm", "async_llm"),
    ("server", "bench", "learn", "plan"),
    ("cli",),
    ("__main__",),
)
# attention, layers and quant are one layer of the table that is itself ordered: a linear layer holds a quant method, a layer
# calls an attention backend and the comm. Scheduler and sampling see none of them.
SIDEWAYS = {
    ("layers", "attention"), ("layers", "quant"), ("layers", "lora"), ("layers", "parallel.comm"), ("quant", "parallel.comm"),
    ("lora", "parallel.comm"), ("models", "spec"), ("attention", "parallel.comm"), ("llm", "async_llm"),
}  # fmt: skip
ROOT = {"minivllm": -1}  # the package itself: a version and lazy names


def room(module: str) -> str | None:
    """The room of ``minivllm.x.y``; None for the package itself."""
    parts = module.split(".")[1:]
    known = {name for layer in LAYERS for name in layer}
    for end in range(len(parts), 0, -1):
        if (name := ".".join(parts[:end])) in known:
            return name
    return parts[0] if parts else None


def level(name: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if name in layer)


def imports(path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and module of every import of our own package, wherever it stands (functions and TYPE_CHECKING blocks too)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.split(".")[0] == "minivllm")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = path.with_suffix("").parts[: -node.level]
                base = ".".join([*above, *([base] if base else [])])
            if base.split(".")[0] == "minivllm":
                yield from ((node.lineno, f"{base}.{a.name}") for a in node.names)


def violations(path: Path, tree: ast.Module) -> list[str]:
    """Every import that goes up, or sideways into another room."""
    here = room(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
    found = []
    for line, module in imports(path, tree):
        there = room(module)
        if here is None or there is None or here == there or module == "minivllm.__version__":
            continue
        if level(there) < level(here) or (here, there) in SIDEWAYS:
            continue
        found.append(f"{path}:{line} imports {module}: {there} is not below {here}")
    return found


def test_imports_go_down_only(sources: list[Any]) -> None:
    assert [v for s in sources for v in violations(s.path, s.tree)] == []


def test_every_room_is_in_the_table(repo: Path) -> None:
    rooms = {p.name for p in (repo / "minivllm").iterdir() if p.is_dir() and (p / "__init__.py").is_file()}
    rooms |= {p.stem for p in (repo / "minivllm").glob("*.py") if p.stem != "__init__"}
    assert rooms <= {name.split(".")[0] for layer in LAYERS for name in layer}


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("minivllm/kv/x.py", "from minivllm.scheduler import request"),
        ("minivllm/kv/x.py", "from minivllm.text import stop"),
        ("minivllm/text/x.py", "def f():\n    import minivllm.server.sse"),
        ("minivllm/scheduler/x.py", "if TYPE_CHECKING:\n    from minivllm.runner.runner import Runner"),
        ("minivllm/scheduler/x.py", "from ..runner import rows"),
        ("minivllm/types.py", "from minivllm import config"),
    ],
)
def test_the_gate_sees_an_import_that_goes_up(path: str, code: str) -> None:
    assert len(violations(Path(path), ast.parse(code))) == 1


def test_package_files_hold_only_a_docstring(sources: list[Any]) -> None:
    """Importing a sub-module must not pull in its neighbours. The package's own lists lazy names, server's a lazy app."""
    allowed = {"minivllm/__init__.py", "minivllm/server/__init__.py"}
    heavy = [s for s in sources if s.path.name == "__init__.py" and s.path.as_posix() not in allowed]
    full = [str(s.path) for s in heavy if any(not isinstance(n, ast.Expr) for n in s.tree.body)]
    # A folder's table of names to import lazily is data, and routes are collected where they are listed.
    assert [p for p in full if "architectures" not in p and "routes" not in p] == []


TORCH_FREE = ("server", "scheduler", "kv", "text", "observe", "models.hub", "bench", "cli")


@pytest.mark.parametrize("name", TORCH_FREE)
def test_no_torch(name: str, repo: Path) -> None:
    """Import every module of a room in a fresh interpreter; torch must not have come along."""
    folder = repo / "minivllm" / name.replace(".", "/")
    modules = [f"minivllm.{name}"]
    if folder.is_dir():
        files = [f for f in folder.rglob("*.py") if f.stem != "__init__"]
        modules = sorted(".".join(f.relative_to(repo).with_suffix("").parts) for f in files)
    code = "import sys, importlib\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    code += "sys.exit(sum(m in sys.modules for m in ('torch', 'transformers')))"
    done = subprocess.run([sys.executable, "-c", code, *modules], cwd=repo, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or f"torch was imported by one of {modules}"


def test_help_loads_nothing_heavy(repo: Path) -> None:
    code = "import sys; from minivllm.cli.main import main; main(['--help'])\n"
    code += "print([m for m in ('torch', 'numpy', 'msgspec', 'fastapi', 'tokenizers', 'asyncio') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
