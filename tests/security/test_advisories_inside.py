# ruff: noqa: E501  (tables of texts)
"""Published attacks that went through a socket, a file, the prefix cache or a neighbour in the batch."""

import ast
import asyncio
import contextlib
import json
import random
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from live_server import serve
from scripted_engine import Live

from minivllm.child import FrameReader
from minivllm.config import make_config
from minivllm.door import locate
from minivllm.engine.guide import CACHE_BYTES, GuideMaker
from minivllm.engine.ipc import FromEngine, ToEngine
from minivllm.errors import InvalidRequest, StartupError
from minivllm.kv.prefix import PrefixKeys
from minivllm.llm import LLM
from minivllm.models.hf_config import HFConfig
from minivllm.models.hub import check_folder
from minivllm.models.registry import read_model
from minivllm.text.grammar import json_grammar, vocabulary
from minivllm.text.helper import FromHelper, Helper, Render, Template, ToHelper, templates
from minivllm.text.tokenizer import Tokenizer, load_tokenizer
from minivllm.types import SamplingParams

# ------------------------------------------------------------------------------------------------------- sockets and pickles

# What unpickling would run: os.system("touch MARK"), in several protocols and wrappings.
PICKLES = [
    b"cos\nsystem\n(S'touch MARK'\ntR.", b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\ntouch MARK\x94\x85\x94R\x94.",
    b"\x80\x02cposix\nsystem\nq\x00X\n\x00\x00\x00touch MARKq\x01\x85q\x02Rq\x03.", b"cbuiltins\neval\n(S'open(\"MARK\", \"w\")'\ntR.",
]  # fmt: skip
SERIALISED = ["CVE-2025-32444", "CVE-2025-47277", "CVE-2024-9053", "CVE-2024-11041", "CVE-2025-30165", "CVE-2026-3059", "CVE-2026-93034",
              "CVE-2026-14890", "CVE-2026-93088"]  # fmt: skip


@pytest.mark.parametrize("advisory", SERIALISED)
def test_a_pickle_in_a_frame_is_an_error(advisory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a frame, as bytes or as an extension type inside a frame, to each side of each of our sockets."""
    monkeypatch.chdir(tmp_path)
    for kind in (ToEngine, FromEngine, ToHelper, FromHelper):
        for pickle in PICKLES:
            names = [part.__struct_config__.tag for part in get_args(kind)]
            wrapped = [pickle, msgspec.msgpack.encode(pickle), msgspec.msgpack.encode(msgspec.msgpack.Ext(5, pickle))]
            wrapped += [msgspec.msgpack.encode({"type": name, "request": pickle, "config": pickle}) for name in (*names, "pickle", 5)]
            for body in wrapped:
                with contextlib.suppress(ValueError):
                    made = FrameReader(kind).feed(len(body).to_bytes(4, "little") + body)  # type: ignore[arg-type]
                    assert all(type(message) in get_args(kind) for message in made)
    assert not list(tmp_path.iterdir())


@given(data=st.binary(max_size=400), cut=st.integers(0, 400))
def test_frames_of_any_bytes(data: bytes, cut: int) -> None:
    for kind in (ToEngine, FromEngine, ToHelper, FromHelper):
        reader = FrameReader(kind)  # type: ignore[arg-type]
        with contextlib.suppress(ValueError):
            assert all(type(message) in get_args(kind) for part in (data[:cut], data[cut:]) for message in reader.feed(part))


@pytest.mark.parametrize("advisory", ["CVE-2025-30202", "CVE-2026-34159"])
def test_inner_sockets_have_no_address(repo: Path, advisory: str) -> None:
    """Processes share socket pairs: nobody else can connect, subscribe, or be slow on them."""
    makers = {"bind", "create_server", "start_server", "start_unix_server", "create_unix_server", "TCPStore", "init_process_group"}
    found = {
        (file.relative_to(repo / "minivllm").as_posix(), node.attr)
        for file in (repo / "minivllm").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in makers
    }
    assert found == {("server/listen.py", "bind")}  # the one listener


@pytest.mark.parametrize("advisory", ["CVE-2025-24357", "CVE-2025-32434", "CVE-2026-15976", "CVE-2026-15969"])
def test_weights_as_pickles_are_refused(bundled_model: Path, tmp_path: Path, advisory: str) -> None:
    for file in bundled_model.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "adapter_model.bin"):
        (tmp_path / name).write_bytes(PICKLES[0])
        with pytest.raises(StartupError, match="pickle"):
            LLM(model=str(tmp_path))
        (tmp_path / name).rename(tmp_path / "model.safetensors")
        with pytest.raises(StartupError):
            LLM(model=str(tmp_path))
        (tmp_path / "model.safetensors").unlink()
    assert not (tmp_path / "MARK").exists() and not Path("MARK").exists()


@pytest.mark.parametrize("advisory", ["CVE-2026-22807", "CVE-2025-66448", "CVE-2026-41523"])
def test_no_option_lets_a_model_bring_code(advisory: str) -> None:
    """There is nothing to trust by mistake, or by an assert that is gone."""
    done = subprocess.run(
        [sys.executable, "-O", "-m", "minivllm", "serve", "--trust-remote-code"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2 and "There is no option --trust-remote-code" in done.stderr


@pytest.mark.parametrize("advisory", ["CVE-2024-45436", "CVE-2024-23605"])
def test_an_index_names_files_of_its_folder(bundled_model: Path, tmp_path: Path, advisory: str) -> None:
    shutil.copytree(bundled_model, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "x.safetensors")
    for name in ("../x.safetensors", str(tmp_path / "x.safetensors"), "a/../../x.safetensors", "x.safetensors\x00", "model.bin", "", 5, None):
        (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(StartupError):
            check_folder(tmp_path / "m")


NUMBERS = ["num_attention_heads", "num_key_value_heads", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size",
           "max_position_embeddings", "head_dim", "rms_norm_eps", "rope_theta", "sliding_window"]  # fmt: skip


@pytest.mark.parametrize("advisory", ["GO-2025-3559", "GO-2025-3689", "GO-2025-3582", "GO-2025-3558", "CVE-2024-21802"])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_a_config_are_checked(bundled_model: Path, tmp_path: Path, name: str, advisory: str) -> None:
    """Zeros to divide by, nothing where something should be, and sizes beyond every memory: a sentence, and no crash."""
    values: dict[str, list[Any]] = {"GO-2025-3559": [0, -0.0], "GO-2025-3689": [-1, -(2**31)], "GO-2025-3582": [None, [], {}, "x"],
                                    "GO-2025-3558": [3, 7, 10**6], "CVE-2024-21802": [2**31, 2**63, 1e308]}  # fmt: skip
    for file in bundled_model.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for value in values[advisory]:
        (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
        with contextlib.suppress(StartupError):
            _, folder = locate(make_config(model=str(tmp_path), load_format="dummy"))
            read_model(HFConfig.read(folder))


# ------------------------------------------------------------------------------------------------------------ time and memory


def test_CVE_2026_115911_a_template_that_never_ends_holds_up_nobody(tmp_path: Path) -> None:
    slow = "{% if messages[0].content == 'slow' %}{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}{% endif %}ok"
    large = "{% if messages[0].content == 'slow' %}{{ 'x' * 3000000000 }}{% endif %}ok"

    async def work(source: str) -> None:
        duty = templates(Template(source, {}))
        helper = Helper(duty)

        async def render(content: str) -> str:
            return await helper.do(Render([{"role": "user", "content": content}], False, False, {}))

        assert await render("hi") == "ok"
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        with pytest.raises(InvalidRequest):
            await render("slow")
        assert await render("hi") == "ok"  # by the next child
        ticking.cancel()
        helper.close()
        assert ticks > 0

    for source in (slow, large):
        asyncio.run(asyncio.wait_for(work(source), 100))


@pytest.fixture(scope="module")
def stories(bundled_model: Path) -> Tokenizer:
    return load_tokenizer(bundled_model)


def test_CVE_2025_32381_grammars_that_are_kept_take_bounded_memory(stories: Tokenizer) -> None:
    maker = GuideMaker(lambda: vocabulary(stories, stories.vocab_size, (0,)), stories.vocab_size)
    for i in range(1500):
        maker.make(json_grammar({"type": "object", "properties": {f"n{i}": {"description": "x" * 3000}}}), hurries=False)
    assert maker._bytes <= CACHE_BYTES and len(maker._made) < 1500


HOSTILE_TEXT = ["<tool_call>" * 20_000, "{" * 50_000, "[TOOL_CALLS]" * 10_000, "<function=" * 20_000, '{"name": "' + "\\" * 50_000, "<think>" * 30_000,
                "<|channel|>" * 20_000, "[" + "f(a=" * 20_000, "<parameter=x>" * 20_000, '"' * 100_001, "a" * 200_000, "\n " * 50_000]  # fmt: skip
PARSE = """
import sys, json, resource
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
from minivllm.text.reply import Function
from minivllm.text.reply_parsers import parsers_of
texts = json.load(sys.stdin)
for name in ("hermes", "llama3_json", "mistral", "qwen3_coder", "deepseek_v3", "pythonic", "openai"):
    for text in texts:
        reader = parsers_of(name, "openai_gptoss" if name == "openai" else "", None).reader([Function("f", {})], None)
        for at in range(0, len(text), 997):
            reader.feed(text[at:at + 997])
        reader.finish()
print("done")
"""


@pytest.mark.parametrize("advisory", ["CVE-2025-71379", "CVE-2025-9141"])
def test_what_a_model_writes_is_read_in_linear_time_and_never_run(advisory: str, repo: Path, tmp_path: Path) -> None:
    texts = HOSTILE_TEXT
    if advisory == "CVE-2025-9141":
        call = "__import__('os').system('touch MARK')"
        texts = [f"<tool_call><function=f><parameter=x>{call}</parameter></function></tool_call>", f"[f(x={call})]",
                 '<tool_call>{"name": "f", "arguments": "' + call + '"}</tool_call>', f"[TOOL_CALLS]f{{{call}}}"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", PARSE], input=json.dumps(texts), capture_output=True, text=True, timeout=110, check=False,
                          cwd=tmp_path, env={"PYTHONPATH": str(repo)})  # fmt: skip
    assert done.stdout == "done\n", done.stderr[-500:]
    assert not list(tmp_path.iterdir())


def test_our_own_patterns_do_not_nest_repetitions(repo: Path) -> None:
    """``(a+)+`` and its kind, in every pattern of the package."""
    nested = re.compile(r"\([^()|]*[+*][^()|]*\)[+*]")
    found = []
    for file in (repo / "minivllm").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            is_re = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "re"
            if is_re and node.args and isinstance(node.args[0], ast.Constant) and nested.search(str(node.args[0].value)):  # type: ignore[attr-defined]
                found.append((file.name, node.args[0].value))  # type: ignore[attr-defined]
    # Each repetition ends at a character that the part inside cannot hold: there is one way to read a text.
    assert {name for name, _ in found} <= {"replies.py", "cli.py", "options.py"}, found


# ---------------------------------------------------------------------------------------------------------- between requests


@pytest.mark.parametrize("advisory", ["CVE-2025-25183", "CVE-2026-65104"])
@given(first=st.lists(st.integers(0, 2**32 - 1), max_size=12), second=st.lists(st.integers(0, 2**32 - 1), max_size=12), salt=st.text(max_size=3))
def test_equal_keys_mean_equal_prefixes(advisory: str, first: list[int], second: list[int], salt: str) -> None:
    def key(ids: list[int], *root: str) -> bytes:
        return (PrefixKeys(1, *root).extend(ids, len(ids)) or [b""])[-1]

    assert (key(first, salt, "") == key(second, salt, "")) == (first == second)
    if first:
        assert len({key(first, salt, ""), key(first, salt + "x", ""), key(first, salt, "x"), key(first, "", salt + "y")}) == 4
        assert len(key(first, salt, "")) == 32


def llm(bundled_model: Path, **options: Any) -> LLM:
    return LLM(model=str(bundled_model), num_threads=1, max_model_len=128, max_num_seqs=8, batch_invariant=True, **options)


def random_sampling(rng: random.Random, vocab: int) -> SamplingParams:
    """Any mixture of what a row of the batch can hold."""
    fields: dict[str, Any] = {"max_tokens": rng.randrange(1, 12), "seed": rng.randrange(2**40), "temperature": rng.choice((0.0, 0.7, 1.3))}
    more: dict[str, Any] = {
        "logit_bias": tuple((rng.randrange(vocab), rng.uniform(-50, 50)) for _ in range(3)), "top_k": rng.randrange(1, 50), "top_p": 0.8, "min_p": 0.1,
        "allowed_token_ids": tuple(rng.sample(range(vocab), 20)), "bad_words": ("the", " a"), "presence_penalty": 1.5, "frequency_penalty": -1.0,
        "repetition_penalty": 1.4, "min_tokens": 1, "stop_token_ids": (rng.randrange(vocab),), "ignore_eos": True, "stop": ("ing", "e"), "logprobs": 3,
        "grammar": json_grammar({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}),
    }  # fmt: skip
    for name in rng.sample(sorted(more), rng.randrange(0, 5)):
        fields[name] = more[name]
    if "grammar" in fields:
        fields.pop("allowed_token_ids", None), fields.pop("bad_words", None)
    return SamplingParams(**fields)


@pytest.mark.parametrize("advisory", ["CVE-2026-114049", "GHSA-v97p-wpxp-px84"])
def test_nothing_of_a_request_is_left_for_another(bundled_model: Path, advisory: str) -> None:
    """Each request of random batches says, to the last bit of its logprobs, what it says alone; also with steps that overlap."""
    rng = random.Random(7)
    shared = llm(bundled_model, async_scheduling=advisory != "CVE-2026-114049")
    alone = llm(bundled_model, enable_prefix_caching=False)
    size = shared.tokenizer.vocab_size
    for _ in range(6):
        prompts = [[rng.randrange(3, size) for _ in range(rng.randrange(1, 20))] for _ in range(rng.randrange(2, 12))]
        sampling = [random_sampling(rng, size) for _ in prompts]
        together = shared.generate(prompts, sampling)
        for prompt, params, found in zip(prompts, sampling, together, strict=True):
            (wanted,) = alone.generate([prompt], [params])
            assert (found.text, found.token_ids, found.logprobs) == (wanted.text, wanted.token_ids, wanted.logprobs)


def test_CVE_2026_93989_token_ids_outside_the_logits(bundled_model: Path) -> None:
    model = llm(bundled_model)
    clean = model.generate(["Once"], SamplingParams(temperature=0, max_tokens=8))[0].text
    size = model.tokenizer.vocab_size
    for ids in ((size,), (2**31 - 1,), (-1,), (5, size), (10**30,)):
        for fields in ({"bad_word_ids": (ids,)}, {"allowed_token_ids": ids}, {"logit_bias": tuple((i, 1.0) for i in ids)}):
            with pytest.raises(InvalidRequest):
                model.generate(["Once", "Once"], [SamplingParams(temperature=0, max_tokens=8, **fields), SamplingParams(max_tokens=8)])
    assert model.generate(["Once"], SamplingParams(temperature=0, max_tokens=8))[0].text == clean


def test_sendnn_508_everybody_gets_the_own_bias(bundled_model: Path) -> None:
    model = llm(bundled_model)
    ids = list(range(300, 340))
    sampling = [SamplingParams(temperature=1.0, seed=i, max_tokens=5, ignore_eos=True, logit_bias=((i, 100.0),)) for i in ids]
    for i, found in zip(ids, model.generate(["Once"] * len(ids), sampling), strict=True):
        assert found.token_ids == [i] * 5


def test_CVE_2025_46570_tenants_do_not_see_what_others_asked(key_file: Path) -> None:
    """What a shorter first token would tell, the count of cached tokens tells for certain."""
    body = {"prompt": "Once upon a time there was a fox who lived by the river and liked to sing. " * 4, "max_tokens": 1}
    keys = ["key-of-ann-0123456789", "key-of-bob-9876543210"]
    with serve("--enable-prompt-tokens-details", "--api-key-file", str(key_file)) as live:

        def cached(key: str, **more: Any) -> int:
            reply = httpx.post(f"{live.url}/v1/completions", json={**body, **more}, headers={"authorization": f"Bearer {key}"}, timeout=60)
            return int(reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

        for salt in ({}, {"cache_salt": "x"}):
            assert cached(keys[0], **salt) == 0 and cached(keys[0], **salt) > 16
            assert cached(keys[1], **salt) == 0 and cached(keys[1], **salt) > 16
        assert httpx.post(f"{live.url}/v1/completions", json=body, timeout=60).status_code == 401


def test_CVE_2026_112266_who_leaves_ends_no_other(start_slow: Callable[[], Live]) -> None:
    """Ids are the server's, and matched whole."""
    live = start_slow()
    body = {"prompt": "x", "max_tokens": 400, "stream": True}
    with httpx.Client(base_url=live.url, timeout=20) as client, client.stream("POST", "/v1/completions", json={**body, "n": 2, "temperature": 1}) as stays:
        pieces = stays.iter_bytes()
        next(pieces)
        kept = {added.id for added in live.client.added}
        for _ in range(10):
            with httpx.stream("POST", f"{live.url}/v1/completions", json=body) as leaves:
                next(leaves.iter_bytes())
        while len(live.client.aborted) < 10:
            assert next(pieces)
        assert not kept & set(live.client.aborted) and len(live.client.aborted) == 10
    assert all(re.fullmatch(r"(cmpl|chatcmpl|gen)-[0-9a-f]{32}-\d+(-\d+)?", added.id) for added in live.client.added)


@pytest.fixture
def start_slow(tokenizer: Tokenizer) -> Any:
    started: list[Live] = []

    def start() -> Live:
        started.append(Live(tokenizer, make_config(port=0, served_model_name=("fox",)), delay_s=0.01).start())
        return started[-1]

    yield start
    for live in started:
        live.end()


# ------------------------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("advisory", ["CVE-2025-59425", "CVE-2026-23996"])
def test_keys_are_compared_in_one_place_and_in_constant_time(repo: Path, advisory: str) -> None:
    users = {f.relative_to(repo / "minivllm").as_posix() for f in (repo / "minivllm").rglob("*.py") if re.search(r"\bapi_key\b", f.read_text())}
    assert users == {"config.py", "server/keys.py", "server/development.py"}
    tree = ast.parse((repo / "minivllm" / "server" / "keys.py").read_text())
    (tenant,) = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "tenant"]
    assert "compare_digest(known, digest)" in ast.unparse(tenant) and not any(isinstance(node, ast.Compare | ast.Return) for node in tenant.body[:-1])
    auth = ast.parse((repo / "minivllm" / "server" / "auth.py").read_text())
    names = {node.attr for node in ast.walk(auth) if isinstance(node, ast.Attribute)}
    assert not names & {"url", "base_url", "client", "host"}  # what a client's Host header would have a part in


@pytest.mark.parametrize("advisory", ["CVE-2026-48746", "CVE-2026-48710", "CVE-2026-49468"])
def test_the_host_header_decides_nothing(locked: Live, speak: Callable[..., bytes], advisory: str) -> None:
    for host in ("x/live", "x/health?a=", "live?", "x?y=/v1", "x#/live", "/live", "@/live", "x:80/live?", "[::1]/live", "x\\live", "x/live%3f", ""):
        for path in ("/v1/models", "/v1/completions", "/metrics", "/openapi.json"):
            data = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
            assert speak(locked.port, data).split()[1] in (b"400", b"401")


@pytest.mark.parametrize("advisory", ["CVE-2026-103270", "CVE-2026-92972", "GO-2025-4251"])
def test_there_is_nothing_to_control_without_a_key(locked: Live, advisory: str) -> None:
    for path in ("/pause", "/resume", "/update_weights", "/abort_requests", "/flush_cache", "/route", "/shutdown", "/sleep", "/api/delete", "/tokenize",
                 "/metrics", "/version", "/v1/models", "/ping", "/load", "/config", "/"):  # fmt: skip
        with httpx.Client(base_url=locked.url, verify=False) as client:
            for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE"):
                status = client.request(method, path).status_code
                assert status == 401 or (path == "/" and status in (200, 404, 405))


def test_CVE_2025_43859_chunks_end_where_they_say(locked: Live, speak: Callable[..., bytes]) -> None:
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nAuthorization: Bearer key-of-ann-0123456789\r\n\r\n"
    inner = b"GET /version HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key-of-ann-0123456789\r\n\r\n"
    for chunk in (b"2\r\n{}xx0\r\n\r\n", b"2\r\n{}0\r\n\r\n", b"2\r\n{}\n\n0\r\n\r\n", b"2\n{}\r\n0\r\n\r\n", b"2\r\n{}\r\r0\r\n\r\n", b" 2\r\n{}\r\n0\r\n\r\n"):
        reply = speak(locked.port, head + chunk + inner, quiet_s=1.5)
        assert re.findall(rb"HTTP/1\.1 (\d+)", reply) == [b"400"], chunk


def test_peak_memory_is_told_in_kib() -> None:
    """The tests of memory compare numbers of this unit."""
    assert 10_000 < resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 10**8
