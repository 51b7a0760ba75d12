"""Rules on the code itself that a reader relies on: sizes, no hidden state, nothing that runs data as code."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MAX_FILE, MAX_FUNCTION, MAX_CLASS, MAX_PARAMETERS = 350, 60, 250, 7
MAX_SERVING_PATH = 20_400
NOT_SERVING = ("bench", "learn", "plan", "server/static", "text/tools", "text/reasoning")

# "path" or "path:name" -> why it may be larger. An entry that is not needed any more fails too.
LARGER: dict[str, str] = {}

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


# ------------------------------------------------------------------------------------------------------------------ sizes


def oversized(source: Any) -> Iterator[tuple[str, str]]:
    """Key and complaint of whatever in a file is over its limit."""
    path = source.path.as_posix()
    if len(source.code_lines) > MAX_FILE:
        yield path, f"{path} has {len(source.code_lines)} code lines, over {MAX_FILE}"
    for node in ast.walk(source.tree):
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            continue
        limit = MAX_CLASS if isinstance(node, ast.ClassDef) else MAX_FUNCTION
        size = source.code_between(node.lineno, node.end_lineno or node.lineno)
        if size > limit:
            yield f"{path}:{node.name}", f"{path}:{node.lineno} {node.name} has {size} code lines, over {limit}"
        if isinstance(node, FUNCTIONS) and not is_kernel(node):
            arguments = node.args
            names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            count = len([n for n in names if n not in ("self", "cls")])
            if count > MAX_PARAMETERS:
                yield f"{path}:{node.name}", f"{path}:{node.lineno} {node.name} takes {count} parameters"


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A Triton kernel: its parameters are pointers, sizes and constants, and there is no record to put them into."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def test_nothing_is_too_large(sources: list[Any]) -> None:
    found = dict(pair for s in sources for pair in oversized(s))
    assert [text for key, text in found.items() if key not in LARGER] == []
    assert [key for key in LARGER if key not in found] == []


def test_the_size_gate_counts_code_and_not_words(parse_source: Any) -> None:
    doc = '"""' + "word\n" * 500 + '"""\n'
    assert len(parse_source(Path("a.py"), doc + "# why\n" * 500 + "x = 1\n").code_lines) == 2
    long = "def f(a, b, c, d, e, g, h, i):\n" + "    a += 1\n" * 60
    assert len(list(oversized(parse_source(Path("a.py"), long)))) == 2
    assert len(list(oversized(parse_source(Path("a.py"), "x = 1\n" * 351)))) == 1


def test_the_serving_path_stays_small(sources: list[Any]) -> None:
    serving = [s for s in sources if not s.path.relative_to("minivllm").as_posix().startswith(NOT_SERVING)]
    assert sum(len(s.code_lines) for s in serving) <= MAX_SERVING_PATH


# ----------------------------------------------------------------------------------------------------------- hidden state


def module_state(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Module-level names bound to something that can be changed.

    A list, dict or set must have a name in capitals: a table that nobody writes to (``writes_to_constants`` looks for writers).
    What is made to be filled (deque, defaultdict, thread-locals, context variables) has no place at module level at all.
    """
    mutable = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    makers = {"list", "dict", "set", "defaultdict", "deque", "Counter", "OrderedDict", "bytearray", "local", "ContextVar"}
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        name = ", ".join(ast.unparse(t) for t in targets)
        called = node.value.func if isinstance(node.value, ast.Call) else None
        maker = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", None)
        if maker in makers:
            yield node.lineno, f"{name} is made by {maker}()"
        elif isinstance(node.value, mutable) and not name.lstrip("_").isupper() and name != "__all__":
            yield node.lineno, f"{name} can be changed"


def writes_to_constants(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Places that change a module-level table: X[...] = y, del X[...], X.append(...) and the like."""
    tables = {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    tables |= {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    tables = {t for t in tables if t.lstrip("_").isupper()}
    changing = {"append", "add", "update", "pop", "clear", "setdefault", "extend", "remove", "insert", "popitem", "discard"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            owner = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in changing:
            owner = node.func.value
        else:
            continue
        if isinstance(owner, ast.Name) and owner.id in tables:
            yield node.lineno, f"{owner.id} is written to"


def test_no_module_holds_state(sources: list[Any]) -> None:
    assert [f"{s.path}:{line} {what}" for s in sources for line, what in module_state(s.tree)] == []
    assert [f"{s.path}:{line} {what}" for s in sources for line, what in writes_to_constants(s.tree)] == []


def test_no_global_statement(sources: list[Any]) -> None:
    found = [f"{s.path}:{n.lineno}" for s in sources for n in ast.walk(s.tree) if isinstance(n, ast.Global)]
    assert found == []


@pytest.mark.parametrize("code", ["cache = {}", "seen: list[int] = []", "_X = threading.local()", "COUNTS = defaultdict(int)"])
def test_the_gate_sees_state(code: str) -> None:
    assert len(list(module_state(ast.parse(code)))) == 1


@pytest.mark.parametrize("code", ["T = {}\nT[0] = 1", "T = []\ndef f():\n    T.append(1)", "T: dict[str, int] = {}\ndel T[0]"])
def test_the_gate_sees_a_written_table(code: str) -> None:
    assert len(list(writes_to_constants(ast.parse(code)))) == 1


# ---------------------------------------------------------------------------------------------------------- what may be run


FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {
    "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "dbm", "yaml", "runpy", "code",
}  # fmt: skip
FORBIDDEN_CALLS = {("torch", "load"), ("np", "load"), ("numpy", "load"), ("torch", "hub"), ("os", "system"), ("os", "popen"),
                   ("torch", "jit"), ("np", "fromfile"), ("builtins", "eval"), ("builtins", "exec"), ("jinja2", "Environment"),
                   ("subprocess", "getoutput"), ("asyncio", "create_subprocess_shell")}  # fmt: skip
FORBIDDEN_IMPORTS = {("torch", "load"), ("torch", "jit"), ("numpy", "load"), ("os", "system"), ("os", "popen"),
                     ("jinja2", "Environment"),
                     ("jinja2.sandbox", "SandboxedEnvironment"), ("builtins", "eval"), ("builtins", "exec")}  # fmt: skip
# torch: model.eval() is a method, and re.compile compiles patterns; both are attributes of something else and not meant.


def runs_data(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Everything that could turn a file's bytes into running code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES and isinstance(node.ctx, ast.Load):
            yield node.lineno, node.id
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.split(".")[0] in FORBIDDEN_MODULES:
                yield node.lineno, module
            yield from ((node.lineno, a.name) for a in node.names if (module, a.name) in FORBIDDEN_IMPORTS)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in FORBIDDEN_CALLS:
                yield node.lineno, f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle", "shell"):
            is_false = isinstance(node.value, ast.Constant) and node.value.value is False
            yield from () if is_false else ((node.value.lineno, str(node.arg)),)


def reads_environment(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every look at the process's environment."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "putenv"):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from ((node.lineno, a.name) for a in node.names if a.name in ("environ", "getenv"))


def test_nothing_runs_data_as_code(sources: list[Any]) -> None:
    assert [f"{s.path}:{line} {what}" for s in sources for line, what in runs_data(s.tree)] == []


def test_the_environment_is_read_in_one_file(sources: list[Any]) -> None:
    found = [(s.path.as_posix(), line, what) for s in sources for line, what in reads_environment(s.tree)]
    assert [f for f in found if f[0] != "minivllm/config.py"] == []
    assert found != []  # the gate sees the one that is allowed


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from yaml import load", "eval('1')", "torch.load(f)", "np.load(f, allow_pickle=True)", "f = exec",
     "AutoModel.from_pretrained(x, trust_remote_code=True)", "subprocess.run(x, shell=True)", "from torch import load as f",
     "import os as system_calls, pickle as p", "from jinja2 import Environment", "builtins.exec", "x = compile"],
)  # fmt: skip
def test_the_gate_sees_what_runs_data(code: str) -> None:
    assert list(runs_data(ast.parse(code)))


def test_no_assert_in_the_package(sources: list[Any]) -> None:
    """``python -O`` removes asserts, so nothing a production run relies on may be one."""
    found = [f"{s.path}:{n.lineno}" for s in sources for n in ast.walk(s.tree) if isinstance(n, ast.Assert)]
    assert found == []


def test_every_public_thing_has_a_docstring(sources: list[Any]) -> None:
    found = []
    for source in sources:
        if not ast.get_docstring(source.tree):
            found.append(f"{source.path}:1")
        for node in source.tree.body:
            is_public = isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_")
            if is_public and not ast.get_docstring(node):
                found.append(f"{source.path}:{node.lineno} {node.name}")
    assert found == []
