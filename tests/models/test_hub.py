"""Finding a model: local folders are checked, hub names are fetched through a small stand-in hub."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from minivllm.errors import BrokenModelFolder, ModelNotFound, PicklesOnly
from minivllm.models.hub import choose_files, fetch_model, weight_files

SHA = "a" * 40
PICKLE = b"\x80\x04pickle that must never be asked for"


def tensors(*names: str, rows: int = 8) -> bytes:
    """The bytes of a small safetensors file."""
    return save({name: np.full((rows, 16), i, dtype=np.float32) for i, name in enumerate(names)})


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


SHARDED = {
    "config.json": b"{}",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode(),
    "model-00001-of-00002.safetensors": tensors("a"),
    "model-00002-of-00002.safetensors": tensors("b"),
}


# ---------------------------------------------------------------------------------------------------------- local folders


def test_a_whole_folder_is_returned_as_it_is(tmp_path: Path) -> None:
    write(tmp_path, {"config.json": b"{}", "model.safetensors": tensors("a"), "pytorch_model.bin": PICKLE})
    assert fetch_model(str(tmp_path), None, None) == tmp_path
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


def test_a_sharded_folder_names_its_shards(tmp_path: Path) -> None:
    write(tmp_path, {**SHARDED, "consolidated.safetensors": tensors("twice")})
    fetch_model(str(tmp_path), None, None)
    assert [p.name for p in weight_files(tmp_path)] == [n for n in SHARDED if n.startswith("model-")]


WHOLE = tensors("a", "b")
BROKEN = {
    "no config": ({"model.safetensors": WHOLE}, BrokenModelFolder, "no config.json"),
    "no weights": ({"config.json": b"{}"}, BrokenModelFolder, "no weights"),
    "pickles only": ({"config.json": b"{}", "pytorch_model.bin": PICKLE}, PicklesOnly, "convert it"),
    "pickles only, .pth": ({"config.json": b"{}", "consolidated.00.pth": PICKLE}, PicklesOnly, "safetensors"),
    "weights of a sub-folder only": ({"config.json": b"{}", "onnx/model.safetensors": WHOLE}, BrokenModelFolder, "no weights"),
    "absent shard": (
        {k: v for k, v in SHARDED.items() if k != "model-00002-of-00002.safetensors"},
        BrokenModelFolder,
        "model-00002-of-00002.safetensors",
    ),
    "shard outside the folder": (
        {"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {"a": "../x.safetensors"}}'},
        BrokenModelFolder,
        "not a safetensors file of this folder",
    ),
    "broken index": ({"config.json": b"{}", "model.safetensors.index.json": b"{"}, BrokenModelFolder, "as JSON"),
    "index without a map": ({"config.json": b"{}", "model.safetensors.index.json": b"[]"}, BrokenModelFolder, "JSON object"),
    "data cut off": ({"config.json": b"{}", "model.safetensors": WHOLE[:-1]}, BrokenModelFolder, "truncated"),
    "data too long": ({"config.json": b"{}", "model.safetensors": WHOLE + b"x"}, BrokenModelFolder, "announces"),
    "header cut off": ({"config.json": b"{}", "model.safetensors": WHOLE[:40]}, BrokenModelFolder, "truncated"),
    "length cut off": ({"config.json": b"{}", "model.safetensors": WHOLE[:5]}, BrokenModelFolder, "truncated"),
    "empty file": ({"config.json": b"{}", "model.safetensors": b""}, BrokenModelFolder, "truncated"),
    "no safetensors at all": (
        {"config.json": b"{}", "model.safetensors": b"\x04" + bytes(7) + b"nope"},
        BrokenModelFolder,
        "header",
    ),
    "header of other shape": (
        {"config.json": b"{}", "model.safetensors": b"\x0a" + bytes(7) + b'{"a": 123}'},
        BrokenModelFolder,
        "header",
    ),
    "lfs pointer": (
        {"config.json": b"{}", "model.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"},
        BrokenModelFolder,
        "git lfs pull",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_one_sentence_that_says_what_to_do(case: str, tmp_path: Path) -> None:
    files, error, words = BROKEN[case]
    write(tmp_path, files)
    with pytest.raises(error, match=re.escape(words)) as caught:
        fetch_model(str(tmp_path), None, None)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_weights_false_wants_no_weights(tmp_path: Path) -> None:
    write(tmp_path, {"tokenizer.json": b"{}"})
    assert fetch_model(str(tmp_path), None, None, weights=False) == tmp_path


def test_a_mistyped_path_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "stories").mkdir()
    with pytest.raises(ModelNotFound, match=r"did you mean .*stories"):
        fetch_model(str(tmp_path / "storys"), None, None)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": WHOLE})
    with pytest.raises(ModelNotFound, match="give the folder"):
        fetch_model(str(tmp_path / "model.safetensors"), None, None)


@pytest.mark.parametrize("name", ["a/b/c", "some model", "ünknown/x"])
def test_what_cannot_be_a_hub_name_asks_no_hub(name: str) -> None:
    with pytest.raises(ModelNotFound, match="There is no folder"):
        fetch_model(name, None, None)


def test_a_local_folder_does_not_load_the_hub_library(tmp_path: Path) -> None:
    write(tmp_path, {"config.json": b"{}", "model.safetensors": WHOLE})
    code = "import sys; from minivllm.models.hub import fetch_model; fetch_model(sys.argv[1], None, None)"
    code += "; print([m for m in ('huggingface_hub', 'torch') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------------------------- the hub


@dataclass
class Hub:
    """A stand-in hub on a local port. Written by its request threads: what was asked of it, and how often a file was cut."""

    repos: dict[str, dict[str, bytes]]
    gated: frozenset[str] = frozenset()
    cut_once: set[str] = field(default_factory=set)  # files whose first download breaks off at two thirds
    log: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range header
    url: str = ""

    def paths(self, method: str = "GET") -> list[str]:
        return [path for m, path, _ in self.log if m == method]


class Handler(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as a download needs."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.hub.log.append((self.command, path, self.headers.get("Range")))
        if match := re.fullmatch(r"/api/models/([\w./-]+?)(/revision/([\w.-]+)|/tree/\w+)?", path):
            repo, kind, revision = match[1], match[2] or "", match[3]
            if repo in self.hub.gated:
                return self.answer(403, b"{}", X_Error_Code="GatedRepo")
            if repo not in self.hub.repos:
                return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
            if revision not in (None, "main", SHA):
                return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
            files = self.hub.repos[repo]
            if kind.startswith("/tree"):
                oids = {name: hashlib.sha1(body).hexdigest() for name, body in files.items()}
                tree = [{"type": "file", "path": n, "size": len(files[n]), "oid": oids[n]} for n in files]
                return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            found = {"id": repo, "modelId": repo, "sha": SHA, "siblings": [{"rfilename": n} for n in files]}
            return self.answer(200, json.dumps(found).encode(), Content_Type="application/json")
        if match := re.fullmatch(r"/([\w.-]+(?:/[\w.-]+)?)/resolve/([\w.-]+)/(.+)", path):
            return self.send_file(self.hub.repos.get(match[1], {}), match[3])
        return self.answer(404, b"{}")

    do_HEAD = do_GET

    def send_file(self, files: dict[str, bytes], name: str) -> None:
        if name not in files:
            return self.answer(404, b"", X_Error_Code="EntryNotFound")
        body = files[name]
        common = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X_Repo_Commit": SHA, "Accept_Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(match[1])
            return self.answer(206, body[start:], Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}", **common)
        if self.command == "GET" and name in self.hub.cut_once:
            self.hub.cut_once.remove(name)
            self.send_response(200)
            for header, value in {"Content-Length": str(len(body)), **common}.items():
                self.send_header(header.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body[: len(body) * 2 // 3])
            self.wfile.flush()
            self.close_connection = True
            return None
        return self.answer(200, body, **common)


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A running stand-in hub with three models."""
    gpt2 = {
        **dict.fromkeys(["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"], b"{}"),
        **{"merges.txt": b"#", "vocab.json": b"{}", "README.md": b"#", "modeling.py": b"raise SystemExit"},
        **{"pytorch_model.bin": PICKLE, "rust_model.ot": PICKLE, "tf_model.h5": PICKLE, "64.tflite": PICKLE},
        **{"model.safetensors": tensors("a", rows=4096), "model.fp16.safetensors": tensors("half")},
        **{"onnx/config.json": b"{}", "onnx/model.safetensors": tensors("a"), "original/consolidated.00.pth": PICKLE},
        **{"model.q4.gguf": PICKLE, "chat_template.jinja": b"{{ messages }}"},
    }
    sharded = {**SHARDED, "consolidated.safetensors": tensors("twice"), "tokenizer.model": b"sp"}
    pickles = {"config.json": b"{}", "pytorch_model.bin": PICKLE, "tokenizer.json": b"{}"}
    hub = Hub({"gpt2": gpt2, "some/sharded": sharded, "some/pickles": pickles}, gated=frozenset({"some/gated"}))
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join(10)


FETCH = """
import json, sys
from minivllm.errors import StartupError
from minivllm.models.hub import fetch_model
try:
    folder = fetch_model(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], weights=sys.argv[4] == "True")
    print(json.dumps([str(folder), sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())]))
except StartupError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


def fetch(hub: Hub, cache: Path, name: str, revision: str | None = None, *, weights: bool = True, **env: str) -> list[str]:
    """Call ``fetch_model`` in a fresh interpreter (the library reads HF_ENDPOINT when it is imported)."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **env}
    answer = subprocess.run(
        [sys.executable, "-c", FETCH, name, json.dumps(revision), str(cache), str(weights)],
        capture_output=True, text=True, env={**os.environ, "HF_HOME": str(cache), **settings}, timeout=120, check=False,
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


def test_gpt2_is_fetched_without_its_pickles(hub: Hub, tmp_path: Path) -> None:
    folder, files = fetch(hub, tmp_path, "gpt2")
    wanted = ["chat_template.jinja", "config.json", "generation_config.json", "merges.txt", "model.safetensors"]
    assert files == wanted + ["tokenizer.json", "tokenizer_config.json", "vocab.json"]
    asked = {path.partition("/resolve/")[2].partition("/")[2] for m in ("GET", "HEAD") for path in hub.paths(m)} - {""}
    assert asked == set(files)  # nothing else was even asked for
    assert (Path(folder) / "model.safetensors").read_bytes() == hub.repos["gpt2"]["model.safetensors"]


def test_a_second_fetch_downloads_nothing_and_offline_finds_the_copy(hub: Hub, tmp_path: Path) -> None:
    first = fetch(hub, tmp_path, "gpt2")
    hub.log.clear()
    assert fetch(hub, tmp_path, "gpt2") == first
    assert not [p for p in hub.paths() if "/resolve/" in p]
    assert fetch(hub, tmp_path, "gpt2", HF_ENDPOINT="http://127.0.0.1:9") == first
    assert fetch(hub, tmp_path, "gpt2", HF_HUB_OFFLINE="1") == first


def test_a_sharded_model_is_fetched_by_its_index(hub: Hub, tmp_path: Path) -> None:
    _, files = fetch(hub, tmp_path, "some/sharded")
    assert files == sorted([*SHARDED, "tokenizer.model"])


def test_weights_false_fetches_no_weights(hub: Hub, tmp_path: Path) -> None:
    _, files = fetch(hub, tmp_path, "gpt2", weights=False)
    assert "tokenizer.json" in files
    assert not [p for m in ("GET", "HEAD") for p in hub.paths(m) if "safetensors" in p]


def test_pickles_alone_are_refused_before_any_download(hub: Hub, tmp_path: Path) -> None:
    kind, sentence = fetch(hub, tmp_path, "some/pickles")
    assert kind == "PicklesOnly"
    assert "convert it" in sentence
    assert not [p for p in hub.paths() if "/resolve/" in p]


def test_an_interrupted_download_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    whole = tensors("a", rows=2**19)  # 32 MiB: the library writes in pieces of 10 MiB, and only whole ones are kept
    hub.repos["gpt2"]["model.safetensors"] = whole
    hub.cut_once.add("model.safetensors")
    folder, _ = fetch(hub, tmp_path, "gpt2")
    if folder in ("BrokenModelFolder", "ModelNotFound"):  # older libraries resume when they are called again
        folder, _ = fetch(hub, tmp_path, "gpt2")
    assert (Path(folder) / "model.safetensors").read_bytes() == whole
    ranges = [r for m, p, r in hub.log if m == "GET" and p.endswith("/model.safetensors")]
    assert len(ranges) == 2
    assert ranges[1] is not None  # the rest was asked for, not the whole
    assert 0 < int(re.findall(r"\d+", ranges[1])[0]) <= len(whole) * 2 // 3


@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [
        ("some/unknown", None, "neither a folder nor a hub model"),
        ("some/gated", None, "accept its terms"),
        ("gpt2", "no-such-branch", "no revision 'no-such-branch'"),
        ("a--b/..x", None, "neither a folder nor"),
    ],
)
def test_what_the_hub_does_not_give_is_one_sentence(
    hub: Hub, tmp_path: Path, name: str, revision: str | None, words: str
) -> None:
    kind, sentence = fetch(hub, tmp_path, name, revision)
    assert kind == "ModelNotFound"
    assert words in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("env", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_without_a_network_the_sentence_says_what_to_check(hub: Hub, tmp_path: Path, env: dict[str, str]) -> None:
    kind, sentence = fetch(hub, tmp_path, "some/sharded", **env)
    assert kind == "ModelNotFound"
    assert "check the network and HF_ENDPOINT" in sentence


def test_any_root_safetensors_serve_when_no_standard_name_is_there() -> None:
    assert choose_files(["config.json", "weights.safetensors", "x/model.safetensors"]) == ["config.json", "weights.safetensors"]
