"""The page as a file and as a reply: size, what it may load, how it is cached, colours that everybody can tell apart."""

import base64
import hashlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from scripted_engine import Live, make_tokenizer

from minivllm.config import make_config

MAX_BYTES = 100_000
# What eyes without one kind of cone see of linear RGB (Machado, Oliveira and Fernandes, 2009; severity 1).
EYES = {
    "all cones": np.eye(3),
    "no L cones": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "no M cones": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    "no S cones": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
}
# Pairs that stand beside each other and mean different things. Shape tells them apart too; colour alone should do.
PAIRS = [("decode", "prefill"), ("decode", "cached"), ("decode", "shared"), ("decode", "away"), ("cached", "shared"),
         ("prefill", "shared"), ("wait", "away"), ("prefill", "cached")]  # fmt: skip


@pytest.fixture(scope="module")
def body(repo: Path) -> bytes:
    return (repo / "minivllm" / "server" / "static" / "index.html").read_bytes()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("tokenizer")
    live = Live(make_tokenizer(folder), make_config(port=0, served_model_name=("fox",), api_key=("secret",))).start()
    yield live.url + "/"
    live.end()


def test_one_small_file_that_loads_nothing_else(body: bytes) -> None:
    text = body.decode()
    assert len(body) < MAX_BYTES
    assert text.count("<script>") == text.count("<style>") == 1 and "<script " not in text
    assert re.findall(r"(?:src|href)\s*=\s*[\"'](?!data:)", text) == []
    assert re.findall(r"url\(|@import|import\(|importScripts|\beval\(|new Function", text) == []
    assert set(re.findall(r"https?://[^\s'\"]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, in the icon


def test_text_never_becomes_markup(body: bytes) -> None:
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|srcdoc|\bon(?:click|error|load)=|createContextualFragment"
    assert re.findall(sinks, body.decode()) == []
    assert "localStorage" not in body.decode() and "document.cookie" not in body.decode()


def test_everybody_gets_the_page_and_its_policy(url: str, body: bytes) -> None:
    reply = httpx.get(url)  # there are keys, and this is one of the paths that need none
    assert reply.status_code == 200 and reply.content == body
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'" and "unsafe" not in reply.headers["content-security-policy"]
    for tag, name in (("script", "script-src"), ("style", "style-src")):
        inside = body.split(f"<{tag}>".encode())[1].split(f"</{tag}>".encode())[0]
        assert policy[name] == f"'sha256-{base64.b64encode(hashlib.sha256(inside).digest()).decode()}'"
    assert reply.headers["x-content-type-options"] == "nosniff"


def test_a_browser_that_has_it_is_told_so(url: str) -> None:
    tag = httpx.get(url).headers["etag"]
    again = httpx.get(url, headers={"if-none-match": f'"other", W/{tag}'})
    assert again.status_code == 304 and again.content == b"" and again.headers["etag"] == tag
    assert httpx.get(url, headers={"if-none-match": '"other"'}).status_code == 200
    head = httpx.head(url)
    assert head.status_code == 200 and head.content == b"" and head.headers["etag"] == tag
    assert httpx.post(url).status_code in (401, 405)


# ---------------------------------------------------------------------------------------------------------------- colours


def themes(body: bytes) -> dict[str, dict[str, str]]:
    """The colours of both themes by name."""
    found = {}
    for name, selector in (("light", ":root {"), ("dark", ":root.dark {")):
        block = body.decode().split(selector)[1].split("}")[0]
        found[name] = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6});", block))
    return found


def linear(colour: str) -> np.ndarray:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    value = np.array([int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    """WCAG's ratio."""
    weights = np.array([0.2126, 0.7152, 0.0722])
    low, high = sorted((float(linear(a) @ weights), float(linear(b) @ weights)))
    return (high + 0.05) / (low + 0.05)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of linear RGB."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ np.clip(rgb, 0, 1)
    scaled = xyz / np.array([0.9505, 1.0, 1.089])
    f = np.where(scaled > 0.008856, np.cbrt(scaled), 7.787 * scaled + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_stand_out_from_their_ground(body: bytes, theme: str) -> None:
    c = themes(body)[theme]
    for ground in ("paper", "surface"):
        assert min(contrast(c[name], c[ground]) for name in ("ink", "soft")) >= 4.5
        signs = ("decode", "prefill", "cached", "shared", "away", "wait")
        assert {name: contrast(c[name], c[ground]) for name in signs if contrast(c[name], c[ground]) < 3} == {}
    assert contrast(c["on-shared"], c["shared"]) >= 4.5
    assert contrast(c["surface"], c["ink"]) >= 7  # buttons and tips


@pytest.mark.parametrize(("theme", "eyes"), list(itertools.product(["light", "dark"], EYES)))
def test_colour_blind_readers_can_tell_them_apart(body: bytes, theme: str, eyes: str) -> None:
    c = {name: lab(EYES[eyes] @ linear(colour)) for name, colour in themes(body)[theme].items()}
    near = {(a, b): float(np.linalg.norm(c[a] - c[b])) for a, b in PAIRS}
    assert {pair: distance for pair, distance in near.items() if distance < 20} == {}
