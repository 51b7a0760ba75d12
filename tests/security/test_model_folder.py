# ruff: noqa: E501  (tables of texts)
"""A folder from a stranger: nothing in it runs, and whatever is wrong with its weights is one sentence.

The traps are a program that would leave a mark, and pipes that nobody writes to: whoever opens one waits for ever.
"""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest

from minivllm.errors import BrokenModelFolder, InvalidRequest, StartupError
from minivllm.models.hub import MAX_HEADER_BYTES, check_folder, check_safetensors, choose_files
from minivllm.text.chat import ChatTemplate
from minivllm.text.tokenizer import load_tokenizer

LOAD = """
import json, sys
opened, ran = [], []
def look(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        opened.append(str(arguments[0]))
    if event == "import" and str(arguments[1] or "").startswith(sys.argv[1]):
        ran.append(arguments[0])
sys.addaudithook(look)
from minivllm.llm import LLM
from minivllm.types import SamplingParams
llm = LLM(model=sys.argv[1], num_threads=1, kv_cache_memory_bytes=2**24, max_model_len=64, cpu_kernels="torch")
text = llm.generate(["Once"], SamplingParams(temperature=0, max_tokens=4))[0].text
try:
    llm.tokenizer.render_chat([{"role": "user", "content": "hi"}])
except Exception as error:
    text += type(error).__name__
print(json.dumps([text, [name for name in opened if name.startswith(sys.argv[1])], ran]))
"""
AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor")
AUTO_MAP = dict.fromkeys(AUTO_CLASSES, "evil.Evil")


def mark(folder: Path) -> str:
    """A program that leaves a mark."""
    return f"import pathlib\npathlib.Path({str(folder / 'MARK')!r}).write_text('ran')\nclass Evil: pass\n"


def add_to(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **fields}))


def trap(folder: Path) -> None:
    """Everything that some loader has been known to run."""
    for name in ("evil.py", "modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "sitecustomize.py",
                 "__init__.py", "custom_generate/generate.py", "tokenizers.py", "json.py"):  # fmt: skip
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(mark(folder))
    for name in ("pytorch_model.bin", "model.pt", "model.pth", "consolidated.00.pth", "training_args.bin", "optimizer.pkl",
                 "adapter_model.bin", "tf_model.h5", "model.ckpt", "flax_model.msgpack"):  # fmt: skip
        os.mkfifo(folder / name)
    code = {"auto_map": AUTO_MAP, "custom_pipelines": {"evil": {"impl": "evil.Evil", "pt": ["AutoModel"]}},
            "trust_remote_code": True, "custom_code": "evil.py", "quantization_config": None}  # fmt: skip
    add_to(folder / "config.json", **code)
    add_to(folder / "generation_config.json", **code, custom_generate="custom_generate/generate.py")
    add_to(folder / "tokenizer_config.json", **code, tokenizer_class="evil.Evil", tokenizer_file=str(folder / "model.pt"))
    for name in ("processor_config.json", "preprocessor_config.json", "adapter_config.json", "special_tokens_map.json"):
        add_to(folder / name, **code)


@pytest.fixture
def model(tmp_path: Path, bundled_model: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(bundled_model, folder)
    return folder


def load(folder: Path) -> tuple[str, list[str], list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, timeout=100, check=False, cwd=folder.parent,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text, opened, ran = json.loads(done.stdout.splitlines()[-1])
    return text, opened, ran


def test_nothing_of_a_trapped_folder_runs(model: Path, bundled_model: Path) -> None:
    trap(model)
    text, opened, ran = load(model)
    assert text == load(bundled_model)[0]
    assert opened and {Path(name).suffix for name in opened} <= {".json", ".jinja", ".safetensors", ".txt", ".model", ""}
    assert ran == [] and not (model / "MARK").exists()


def test_a_trapped_template_runs_nowhere(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}{% include 'evil.py' %}")
    trap(model)
    text, _, ran = load(model)
    assert text.endswith("InvalidRequest") and ran == [] and not (model / "MARK").exists()


def test_pickles_alone_are_refused_unopened(model: Path) -> None:
    (model / "model.safetensors").unlink()
    trap(model)
    with pytest.raises(StartupError, match="pickle"):
        check_folder(model)


def test_nothing_that_could_run_is_fetched() -> None:
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    traps = {"evil.py", "pytorch_model.bin", "model.pt", "a/evil.py", "x.pkl", "model.safetensors.py", "config.json.py", "x.so",
             "x.sh", "evil.json\n.py", "sub/model.safetensors", "../model.safetensors", "x.gguf"}  # fmt: skip
    assert set(choose_files(wanted | traps)) == wanted


def test_a_tokenizer_that_needs_code_is_refused(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    trap(model)
    with pytest.raises(StartupError):
        load_tokenizer(model)
    assert not (model / "MARK").exists()


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch MARK').read() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('MARK', 'w') }}",
    "{{ strftime_now.__code__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.cycler.__init__.__globals__.os }}",
    "{{ lipsum.__globals__['os'].system('touch MARK') }}",
    "{{ (''|attr('__class__')) }}{{ (''|attr('__class__')).__mro__ }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f')|attr('mro') }}{{ raise_exception('no') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ '%s'|format(raise_exception.__globals__) }}",
    "{{ ['{0.__globals__}']|map('format', raise_exception)|list }}{{ raise_exception('no') }}",
    "{{ messages|map(attribute='__class__')|list }}{{ raise_exception('no') }}",
    "{% include '/etc/passwd' %}", "{% import 'evil.py' as x %}", "{% extends '/etc/passwd' %}",
    "{% from 'os' import system %}",
    "{% set x = messages.append(1) %}", "{% set x = messages[0].update({'a': 1}) %}", "{{ messages.clear() }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ namespace.__init__.__globals__ }}", "{{ joiner.__init__.__globals__ }}",
    "{{ (messages|tojson).__class__.__base__.__subclasses__()[0].__init__.__globals__ }}",
    "{{ x.__class__.__bases__ }}", "{{ get_flashed_messages.__globals__ }}", "{{ config.items() }}{{ raise_exception('no') }}",
    "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{{ m.__globals__ }}{% call m() %}{% endcall %}",
    "{{ loop.__globals__ }}{% for m in messages %}{{ loop.__init__.__globals__ }}{% endfor %}",
]  # fmt: skip


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_does_not_get_out(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chat = [{"role": "user", "content": "hi"}]
    try:
        assert ChatTemplate(source, {}).render(chat).strip() == ""  # what is not to be seen is not there
    except InvalidRequest as refusal:
        assert "root:" not in refusal.message
    assert not list(tmp_path.iterdir()) and chat == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "source",
    ["{{ 'x' * 10**11 }}", "{{ 'x'|center(10**11) }}", "{% if 10**(10**9) %}{% endif %}", "{% set x = [1] * 10**11 %}", "{{ 9**(9**9) }}",
     "{% for i in 'x' * 10**11 %}{% endfor %}", "{{ ('a' ~ 'b') * 10**11 }}", "{{ ['x' * 10**11]|join }}", "{{ '%1000000000000d' % 5 }}"],
)  # fmt: skip
def test_a_template_computes_nothing_before_it_is_rendered(source: str) -> None:
    """Compiling it, which the server does to see what it reads, takes no time and no memory; rendering is a limited child's."""
    assert ChatTemplate(source, {}).reads == frozenset()


@pytest.mark.parametrize("source", ["{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", "{% if 1 %}" * 3000 + "{% endif %}" * 3000])
def test_a_template_that_is_nested_too_deeply(source: str) -> None:
    with pytest.raises(jinja2.TemplateError):
        ChatTemplate(source, {})


# ------------------------------------------------------------------------------------------------------ safetensors' header


def write(path: Path, header: bytes | dict[str, Any], data: int = 0, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with path.open("wb") as file:
        file.write((len(text) if length is None else length).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + data)
    return path


def tensor(begin: Any, end: Any, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BAD: dict[str, Callable[[Path], Path]] = {
    "overlapping": lambda p: write(p, {"a": tensor(0, 8), "b": tensor(4, 12)}, 12),
    "the same span": lambda p: write(p, {"a": tensor(0, 8), "b": tensor(0, 8)}, 8),
    "a gap": lambda p: write(p, {"a": tensor(0, 8), "b": tensor(16, 24)}, 24),
    "not from 0": lambda p: write(p, {"a": tensor(8, 16)}, 16),
    "backwards": lambda p: write(p, {"a": tensor(8, 0)}, 8),
    "negative": lambda p: write(p, {"a": tensor(-8, 0)}, 0),
    "beyond the file": lambda p: write(p, {"a": tensor(0, 800)}, 8),
    "less than the file": lambda p: write(p, {"a": tensor(0, 8)}, 800),
    "2^63": lambda p: write(p, {"a": tensor(0, 2**63)}, 8),
    "2^64": lambda p: write(p, {"a": tensor(0, 2**64)}, 8),
    "2^200": lambda p: write(p, {"a": tensor(0, 2**200)}, 8),
    "1e308": lambda p: write(p, b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 1e308]}}', 8),
    "NaN": lambda p: write(p, b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, NaN]}}', 8),
    "true": lambda p: write(p, {"a": tensor(0, True)}, 8),
    "text": lambda p: write(p, {"a": tensor("0", "8")}, 8),
    "one offset": lambda p: write(p, {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, 8),
    "no dtype": lambda p: write(p, {"a": {"shape": [2], "data_offsets": [0, 8]}}, 8),
    "a shape of text": lambda p: write(p, {"a": tensor(0, 8, "xx")}, 8),
    "a list": lambda p: write(p, b"[]"),
    "nothing": lambda p: write(p, b""),
    "no JSON": lambda p: write(p, b"{" * 1000),
    "deep": lambda p: write(p, b'{"a":' * 10**5 + b"1" + b"}" * 10**5),
    "not UTF-8": lambda p: write(p, b'{"\xff": 1}'),
    "a length of 2^63": lambda p: write(p, {"a": tensor(0, 8)}, 8, length=2**63),
    "a length of 2^64 - 1": lambda p: write(p, {"a": tensor(0, 8)}, 8, length=2**64 - 1),
    "a header of 100 MB": lambda p: write(p, b"{" + b" " * 10**8 + b"}"),
    "the longest header and one more": lambda p: write(p, b"{" + b" " * (MAX_HEADER_BYTES - 1) + b"}"),
    "a million tensors": lambda p: write(p, b"{" + b",".join(b'"%d":%s' % (i, ONE) for i in range(10**6)) + b"}", 8),
    "150,000 tensors, the last one wrong": lambda p: write(p, many(150_000), 8 * 150_001),
    "half a head": lambda p: (p.write_bytes(b"\x01\x00"), p)[1],
    "a pointer": lambda p: (p.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), p)[1],
}  # fmt: skip
ONE = b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


def many(count: int) -> bytes:
    rows = (b'"%d":{"dtype":"F32","shape":[2],"data_offsets":[%d,%d]}' % (i, 8 * i, 8 * i + 8) for i in range(count))
    return b"{" + b",".join(rows) + b"}"


@pytest.mark.parametrize("case", BAD)
def test_a_header_that_lies_is_one_sentence_and_little_memory(tmp_path: Path, case: str) -> None:
    path = BAD[case](tmp_path / "model.safetensors")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BrokenModelFolder) as refusal:
        check_safetensors(path)
    assert len(str(refusal.value)) < 500 + len(str(path)) and "\n" not in str(refusal.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB; for the longest header that is read


def test_good_headers_pass(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    in_any_order = {"__metadata__": {"format": "pt"}, "b": tensor(8, 16), "a": tensor(0, 8), "empty": tensor(16, 16, (0,))}
    check_safetensors(write(path, in_any_order, 16))
    check_safetensors(write(path, {}))


def test_bytes_changed_at_random(tmp_path: Path) -> None:
    """Whatever a header becomes, it passes or is refused with a sentence."""
    rng, path = random.Random(5), tmp_path / "model.safetensors"
    good = json.dumps({f"layer.{i}": tensor(8 * i, 8 * i + 8) for i in range(20)}).encode()
    refused = 0
    for _ in range(2000):
        header = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            header[rng.randrange(len(header))] = rng.choice(b'0123456789{}[]",:.-eE\x00\xff\\ntf ')
        try:
            check_safetensors(write(path, bytes(header), 160))
        except BrokenModelFolder:
            refused += 1
    assert 1000 < refused < 2000
