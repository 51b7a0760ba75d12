"""What the page shows of a real server: lanes, cells, blocks, replays; and that it is the same as the records say."""

import gzip
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from live_server import LiveServer, serve
from page_driver import live, mode, shown, until, wait_idle

from minivllm.errors import InvalidRequest
from minivllm.observe.state import State
from minivllm.records import StepRecord
from minivllm.server.protocol import CompletionBody
from minivllm.types import SETTLED, SamplingParams

LONG = "Once upon a time there was a little fox who lived in a small house by the sea with her mother and father. " * 3


def records_of(server: LiveServer) -> list[tuple[int, StepRecord]]:
    """All records that the server keeps, in pages as it tells them."""
    found: list[tuple[int, StepRecord]] = []
    while True:
        page = httpx.get(server.url + "/steps", params={"since": len(found), "limit": 1000}).json()
        assert "base" not in page  # nothing was dropped yet
        if not page["steps"]:
            return found
        found += [(s["seq"], msgspec.convert(s, StepRecord)) for s in page["steps"]]


def fold(records: list[StepRecord]) -> Any:
    """The server's own fold, in the form that JSON has."""
    state = State(16)
    for record in records:
        state.apply(record)
        state.check(record)
    return msgspec.to_builtins(state.snapshot().base())


def plain(base: Any) -> Any:
    """A base without what is a matter of order."""
    requests = {
        r["id"]: (r["num_prompt"], r["num_computed"], r["state"], [list(ids) for ids in r["table"]], list(r["tokens"]))
        for r in base["requests"]
    }
    held = {(g, b): sorted(ids) for g, b, ids in base["blocks"]["held"]}
    cached = {(g, b): list(tokens) for g, b, tokens in base["blocks"]["cached"]}
    return requests, held, cached, base["blocks"]["total"]


def number(page: Any, kind: str) -> int:
    """A count of the cache's legend."""
    return int(page.inner_text(f"#n-{kind}").replace(",", ""))


def go_to(page: Any, seq: int) -> None:
    """Hold the page as it was after this record."""
    if page.evaluate("document.documentElement.dataset.mode") == "live":
        page.click("#pause")
        page.wait_for_selector("#transport:not([hidden])")
    first = page.evaluate("Number(document.documentElement.dataset.seq) - Number(document.querySelector('#seek').value)")
    move = "at => { const s = document.querySelector('#seek'); s.value = at; s.dispatchEvent(new Event('input')); }"
    page.evaluate(move, seq - first)
    shown(page, seq)


# ------------------------------------------------------------------------------------------------------------ what it shows


@pytest.fixture
def eight(page: Any, server: LiveServer) -> list[tuple[int, StepRecord]]:
    """The records after eight prompts were sent with the button and have ended."""
    page.click("#eight")
    until(page, "document.querySelectorAll('.cards .said').length === 8")
    wait_idle(page)
    records = records_of(server)
    shown(page, records[-1][0])
    return records


def test_eight_prompts_are_eight_lanes_of_one_batch(page: Any, eight: list[tuple[int, StepRecord]]) -> None:
    ids = page.evaluate("[...document.querySelectorAll('.cards .link')].map(b => b.title || b.textContent)")
    assert len(set(ids)) == 8
    together = [r for _, r in eight if sum(row.kind == "decode" for row in r.rows) == 8]
    assert together
    lanes = {lane["id"]: lane for lane in page.evaluate("glass.lanes")}
    assert {row.id for row in together[0].rows} <= lanes.keys()
    texts = page.eval_on_selector_all(".cards .text", "found => found.map(t => t.textContent.length)")
    assert len(texts) == 8 and min(texts) > 20
    assert page.is_hidden("#empty") and page.is_hidden("#problem")


def test_blocks_are_held_and_come_back(page: Any, eight: list[tuple[int, StepRecord]]) -> None:
    total = eight[-1][1].blocks_total
    assert number(page, "held") == number(page, "shared") == 0
    assert number(page, "free") + number(page, "cached") == total
    busiest, record = max(eight, key=lambda pair: pair[1].blocks_referenced)
    assert record.blocks_referenced >= 8
    go_to(page, busiest)
    assert number(page, "held") + number(page, "shared") == record.blocks_referenced
    assert number(page, "free") == record.blocks_free and number(page, "cached") == record.blocks_cached


def test_cells_and_blocks_are_those_of_the_records(page: Any, eight: list[tuple[int, StepRecord]]) -> None:
    assert plain(page.evaluate("glass.state")) == plain(fold([r for _, r in eight]))
    rows = {(row.id, seq): row.kind[0] for seq, r in eight for row in r.rows}
    cells = {
        (lane["id"], seq): seg["k"]
        for lane in page.evaluate("glass.lanes") for seg in lane["segs"] if seg["k"] in "pd"
        for seq in range(seg["a"], seg["b"] + 1)
    }  # fmt: skip
    assert cells == rows
    ends = {f.id: seq for seq, r in eight for f in r.finished}
    assert {lane["id"]: lane["end"] for lane in page.evaluate("glass.lanes")} == ends
    for at in (len(eight) // 3, len(eight) // 2, len(eight) - 2):  # and at any step before
        go_to(page, eight[at][0])
        assert plain(page.evaluate("glass.state")) == plain(fold([r for _, r in eight[: at + 1]]))


def test_a_shared_prefix_shows_as_shared(page: Any, server: LiveServer) -> None:
    page.fill("#prompt", LONG)
    page.select_option("#which", "same")
    before = len(records_of(server))
    page.click("#eight")
    until(page, "document.querySelectorAll('.cards .said').length === 8")
    wait_idle(page)
    records = records_of(server)
    shared: dict[int, int] = {}
    for seq, _ in records[before:]:
        held = fold([r for _, r in records[: seq + 1]])["blocks"]["held"]
        shared[seq] = sum(len(ids) > 1 for _, _, ids in held)
    most = max(shared, key=lambda seq: shared[seq])
    assert shared[most] >= 3
    shown(page, records[-1][0])
    go_to(page, most)
    assert number(page, "shared") == shared[most]
    held = [(b, ids) for _, b, ids in page.evaluate("glass.state.blocks.held") if len(ids) > 1]
    block, ids = max(held, key=lambda pair: len(pair[1]))
    page.focus("#kv")
    page.keyboard.press("Home")
    for _ in range(block - 1):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.inner_text("#looked h2") == f"Block {block}"
    assert f"Shared by {len(ids)} requests" in page.inner_text("#looked")
    until(page, "document.querySelector('#looked .quote')?.textContent.length > 0")
    assert page.inner_text("#looked .quote").strip()[:10] in LONG
    assert page.locator("#looked tbody tr").count() == len(ids)


def test_a_prefix_is_seen_to_be_found_again(page: Any, server: LiveServer) -> None:
    for _ in range(2):
        page.fill("#prompt", "The second time nothing of this needs to be computed. " + LONG)
        page.click("#send")
        until(page, "!document.querySelector('#stop').disabled")
        wait_idle(page)
    record = next(r for _, r in reversed(records_of(server)) if any(row.cached for row in r.rows))
    row = next(row for row in record.rows if row.cached)
    told = f"found {row.cached} of its first {row.cached + row.num_tokens} tokens"
    assert row.cached >= 32 and told in page.inner_text("#note")


def test_a_recording_replays_to_the_same_picture(
    page: Any, eight: list[tuple[int, StepRecord]], recording: Path, server: LiveServer
) -> None:
    page.click("#pause")
    page.wait_for_selector("#transport:not([hidden])")
    live_state, live_pictures, live_lanes = page.evaluate("[glass.state, glass.pictures(), glass.lanes]")
    page.click("#leave")
    mode(page, "live")
    page.wait_for_timeout(600)  # the recorder writes a few times a second
    page.set_input_files("#file", recording)
    mode(page, "replay")
    page.click("#to-end")
    shown(page, eight[-1][0])
    assert page.evaluate("[glass.state, glass.lanes]") == [live_state, live_lanes]
    assert page.evaluate("glass.pictures()") == live_pictures
    middle = eight[len(eight) // 2][0]
    go_to(page, middle)
    forth = page.evaluate("[glass.state, glass.pictures()]")
    assert forth[1] != live_pictures
    for key in ("#one-on", "#one-on", "#one-back", "#one-back"):
        page.click(key)
    shown(page, middle)
    assert page.evaluate("[glass.state, glass.pictures()]") == forth
    page.select_option("#speed", "50")
    page.click("#run")
    shown(page, eight[-1][0])
    assert page.evaluate("glass.pictures()") == live_pictures and page.inner_text("#run") == "Play"


def test_a_step_and_a_request_are_looked_at_closely(page: Any, eight: list[tuple[int, StepRecord]]) -> None:
    seq, record = next((s, r) for s, r in reversed(eight) if len(r.rows) >= 2)
    go_to(page, seq)
    page.focus("#batch")
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    assert page.inner_text("#looked h2") == f"Step {record.step:,}"
    rows = page.eval_on_selector_all("#looked table:first-of-type tbody tr", "rows => rows.map(r => r.cells[1].textContent)")
    assert rows[: len(record.rows)] == [row.kind for row in record.rows]
    titles = page.eval_on_selector_all("#looked tbody .link[title]", "found => found.map(b => b.title)")
    assert titles[: len(record.rows)] == [row.id for row in record.rows]
    page.locator("#looked tbody .link[title]").first.click()
    until(page, "document.querySelector('#looked').textContent.includes('prompt chunks')")
    assert record.rows[0].id in page.inner_text("#looked")
    page.keyboard.press("Escape")
    assert page.is_visible("#play") and page.evaluate("document.activeElement.id") == "batch"


# ------------------------------------------------------------------------------------------------------------------ its use


def test_it_can_be_used_without_a_mouse(page: Any) -> None:
    seen = []
    for _ in range(60):
        page.keyboard.press("Tab")
        name, ring = page.evaluate(
            "[document.activeElement.id, getComputedStyle(document.activeElement).outlineStyle !== 'none'"
            " || document.activeElement.tagName === 'CANVAS']"
        )
        seen.append(name)
        assert ring or not name, f"{name} has the focus, but nothing shows it"
    wanted = ["theme", "tab-completion", "prompt", "send", "eight", "which", "pause", "batch", "kv", "span"]
    assert [name for name in seen if name in wanted][:10] == wanted
    page.focus("#tab-completion")
    page.keyboard.press("ArrowRight")
    assert page.get_attribute("#tab-chat", "aria-selected") == "true" and page.is_visible("#system")
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    until(page, "document.querySelector('#talk .text')?.textContent.length > 10")
    wait_idle(page)
    page.focus("#batch")
    page.keyboard.press("ArrowLeft")
    said = page.inner_text("#voice")
    page.keyboard.press("ArrowLeft")
    assert "step" in said and page.inner_text("#voice") != said
    page.keyboard.press("e")
    assert page.inner_text("#looked h2").startswith("Request ")
    page.keyboard.press("Escape")
    page.keyboard.press(" ")
    page.wait_for_selector("#transport:not([hidden])")
    page.keyboard.press(" ")
    page.wait_for_selector("#transport", state="hidden")


def test_conversations_go_on(page: Any) -> None:
    bodies: list[Any] = []
    page.on("request", lambda r: bodies.append(r.post_data_json) if r.method == "POST" and "/v1/" in r.url else None)
    page.click("#tab-chat")
    for text in ("Tell me a story about a cat.", "Tell me another one."):
        page.fill("#prompt", text)
        page.click("#send")
        until(page, "!document.querySelector('#stop').disabled")
        wait_idle(page)
    assert [m["role"] for m in bodies[1]["messages"]] == ["user", "assistant", "user"]
    answers = page.eval_on_selector_all("#talk .text", "found => found.map(t => t.textContent)")
    assert len(answers) == 2 and bodies[1]["messages"][1]["content"] == answers[0] != ""


def test_eight_conversations_batch_too(page: Any, server: LiveServer) -> None:
    page.click("#tab-chat")
    before = len(records_of(server))
    page.click("#eight")
    until(page, "document.querySelectorAll('.cards .said').length === 8")
    wait_idle(page)
    assert max(sum(row.kind == "decode" for row in r.rows) for _, r in records_of(server)[before:]) == 8


def test_it_stops(page: Any, server: LiveServer) -> None:
    field(page, "max_tokens").fill("900")
    page.click("#eight")
    until(page, "document.querySelectorAll('.cards .link').length === 8")
    page.click("#stop")
    until(page, "document.querySelector('.cards .meta').textContent.includes('stopped')")
    wait_idle(page)
    server.wait_idle()


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("temperature", "0", "n must be 1 at temperature 0"),  # the server says so
        ("temperature", "3", "temperature:"),
        ("allowed_token_ids", "1 two", 'allowed_token_ids: "two" is no token id'),
        ("logit_bias", "{", "logit_bias must be JSON"),
        ("seed", "1.5", "seed:"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    visit: Callable[..., Any], server: LiveServer, option: str, value: str, problem: str
) -> None:
    page = visit(server.url, may_log="status of 400")
    page.click("#all summary")
    field(page, option).fill(value)
    page.select_option("#which", "same")
    page.click("#eight")
    page.wait_for_selector("#problem:not([hidden])")
    text = page.inner_text("#problem")
    assert text.startswith(problem) and "\n" not in text
    assert page.get_attribute("#problem", "role") == "alert"


def field(page: Any, name: str) -> Any:
    """The input of an option."""
    return page.locator(f"[name={name}]")


def test_options_reach_the_request(page: Any) -> None:
    bodies: list[Any] = []
    page.on("request", lambda r: bodies.append(r.post_data_json) if r.method == "POST" and "/v1/" in r.url else None)
    page.fill("#prompt", "Once upon a time")
    page.click("#all summary")
    given = {"top_k": "40", "seed": "7", "max_tokens": "20", "stop": "zebra\nquagga", "stop_token_ids": "2, 3", "n": "2",
             "logprobs": "2", "repetition_detection": '{"max_pattern_size": 3, "min_count": 8}'}  # fmt: skip
    for name, value in given.items():
        field(page, name).fill(value)
    field(page, "ignore_eos").select_option("true")
    field(page, "structured_outputs").select_option("regex")
    page.fill("#form-text", "[a-z ]{5,60}")
    page.click("#send")
    until(page, "document.querySelectorAll('.cards mark').length > 4")
    wait_idle(page)
    assert bodies[0] == {
        "prompt": "Once upon a time", "stream": True, "temperature": 0.8, "top_k": 40, "seed": 7, "max_tokens": 20, "n": 2,
        "stop": ["zebra", "quagga"], "stop_token_ids": [2, 3], "logprobs": 2, "ignore_eos": True,
        "repetition_detection": {"max_pattern_size": 3, "min_count": 8}, "structured_outputs": {"regex": "[a-z ]{5,60}"},
    }  # fmt: skip
    texts = page.eval_on_selector_all(".cards .text", "found => found.map(t => t.textContent)")
    assert [text for text in texts if not re.fullmatch(r"[a-z ]{5,60}", text)] == []
    assert "%" in page.get_attribute(".cards mark >> nth=0", "title")


def test_a_phone_shows_all_of_it(visit: Callable[..., Any], server: LiveServer) -> None:
    page = visit(server.url, viewport={"width": 380, "height": 760}, has_touch=True, is_mobile=True)
    live(page)
    page.click("#eight")
    wait_idle(page)
    page.click("#all summary")
    for look in ("page", "step"):
        if look == "step":
            page.evaluate("document.querySelector('#batch').scrollIntoView({block: 'start'})")
            page.locator("#batch").tap(position={"x": 300, "y": 90})
            page.wait_for_selector("#looked h2")
        assert page.evaluate("document.scrollingElement.scrollWidth") <= 380, look
        sizes = page.eval_on_selector_all("#send, #eight, #pause", "found => found.map(b => b.offsetHeight)")
        assert min([size for size in sizes if size] or [34]) >= 30
    page.click("#back")
    assert page.is_visible("#prompt")


def test_light_dark_and_the_switch_between(visit: Callable[..., Any], server: LiveServer) -> None:
    def ground(page: Any) -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light, dark = visit(server.url, color_scheme="light"), visit(server.url, color_scheme="dark")
    assert (ground(light), ground(dark)) == ("rgb(246, 244, 238)", "rgb(18, 21, 24)")
    live(light)
    before = light.evaluate("glass.pictures()")
    light.click("#theme")
    assert ground(light) == ground(dark)
    light.wait_for_timeout(100)
    assert light.evaluate("glass.pictures()") != before


# -------------------------------------------------------------------------------------------------------- what may go wrong


MARKUP = "<img src=x onerror=\"window.hurt=1\"><script>window.hurt=1</script>"
HEADER = {"format": "mini-vllm steps", "version": 1, "model": MARKUP, "started_unix_s": 0.0, "started_s": 0.0,
          "info": {"block_size": 16, "num_blocks": 9}}  # fmt: skip


def made_record(i: int, name: str, **more: Any) -> Any:
    """A record of a decode of one request, as plain values."""
    first = {"life": 0, "arrived": [{"id": name, "arrival_s": 0.0, "num_prompt": 4, "max_tokens": 9}]} if i == 0 else {}
    row = {"id": name, "start": i, "num_tokens": 1, "kind": "decode"} | ({"blocks": [[1]]} if i == 0 else {})
    return {
        "step": i, "scheduled_s": float(i), "launched_s": i + 0.1, "finished_s": i + 0.2, "collected_s": i + 0.3, "rows": [row],
        "num_running": 1, "num_waiting": 0, "waits": [], "rest_waits": "", "blocks_total": 8, "blocks_free": 7,
        "blocks_cached": 0, "blocks_referenced": 1, "prefix_queries": 0, "prefix_hits": 0, "num_prompt_tokens": 0,
        "num_output_tokens": 1, "ttft_s": [], "itl_s": [], "finished": [], **first, **more,
    }  # fmt: skip


def test_markup_is_shown_as_text(page: Any, write_recording: Callable[..., Path]) -> None:
    page.fill("#prompt", MARKUP)
    page.click("#all summary")
    field(page, "echo").select_option("true")
    page.click("#send")
    until(page, "document.querySelector('#talk .text')?.textContent.includes('<img src=x')")
    wait_idle(page)
    waits = [{"id": MARKUP, "reason": f"blocks: {MARKUP}", "behind": [MARKUP]}]
    records = [made_record(i, MARKUP, waits=waits) for i in range(9)]
    page.set_input_files("#file", write_recording(records, HEADER))
    mode(page, "replay")
    assert MARKUP in page.inner_text("#model")
    page.focus("#batch")
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    assert f"blocks: {MARKUP}" in page.inner_text("#looked")
    page.keyboard.press("Escape")
    page.keyboard.press("e")
    assert MARKUP in page.inner_text("#looked")
    page.hover("#batch", position={"x": 100, "y": 80})
    assert page.evaluate("[document.querySelectorAll('img').length, document.scripts.length, window.hurt]") == [0, 1, None]


def test_the_policy_would_stop_what_slipped_through(visit: Callable[..., Any], server: LiveServer) -> None:
    page = visit(server.url, may_log="Content Security Policy|requires 'Trusted")
    caught = page.evaluate(
        """async () => {
            const caught = [];
            try { document.body.innerHTML = "<b>x</b>"; caught.push("markup"); } catch {}
            const script = document.createElement("script");
            try { script.text = "window.hurt = 1"; } catch {}
            document.body.append(script);
            if (window.hurt) caught.push("script");
            try { await fetch("http://127.0.0.2:9/"); caught.push("elsewhere"); } catch {}
            return caught;
        }"""
    )
    assert caught == []


def test_a_recording_that_was_cut_off_shows_what_is_whole(page: Any, write_recording: Callable[..., Path]) -> None:
    records = [made_record(i, "gen-" + "0" * 32) for i in range(500)]
    page.set_input_files("#file", write_recording(records, HEADER | {"model": "fox"}, cut=40))
    page.wait_for_selector("#problem:not([hidden])")
    assert "it ends early" in page.inner_text("#problem")
    page.click("#to-end")
    until(page, "Number(document.documentElement.dataset.seq) > 200")


packed_at_no_time = partial(gzip.compress, mtime=0)  # a test's name must not depend on the clock


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is no recording"),
        (b"no recording at all", "is no recording"),
        (b"\x28\xb5\x2f\xfd\x00", "is no recording"),
        (packed_at_no_time(b"\xc1\xc1\xc1"), "is damaged"),
        (packed_at_no_time(b"\x91" * 4000), "is damaged"),
        (packed_at_no_time(msgspec.msgpack.encode({"format": "another", "version": 1})), "is no recording of mini-vLLM"),
        (packed_at_no_time(msgspec.msgpack.encode({"format": "mini-vllm steps", "version": 7})), "reads version 1"),
        (packed_at_no_time(msgspec.msgpack.encode(HEADER)), "holds no steps"),
        (packed_at_no_time(msgspec.msgpack.encode(HEADER) + msgspec.msgpack.encode({"rows": 3})), "is damaged"),
        (packed_at_no_time(msgspec.msgpack.encode(HEADER) + msgspec.msgpack.encode({"rows": [3]})), "cannot be read"),
        (packed_at_no_time(msgspec.msgpack.encode(HEADER) + msgspec.msgpack.encode(made_record(0, "a", freed=[[0, 1]]) | {
            "rows": [{"id": "a", "start": 0, "num_tokens": 1, "kind": "decode", "blocks": [[2**40]]}]})), "is damaged"),
    ],
)
def test_what_is_no_recording_is_said_so(page: Any, tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "file.rec"
    path.write_bytes(content)
    page.set_input_files("#file", path)
    page.wait_for_selector("#problem:not([hidden])")
    assert problem in page.inner_text("#problem")
    assert page.evaluate("document.documentElement.dataset.mode") == "live"


def test_a_recording_may_be_dropped_anywhere(page: Any, write_recording: Callable[..., Path]) -> None:
    body = write_recording([made_record(i, "gen-" + "1" * 32) for i in range(20)], HEADER | {"model": "fox"}).read_bytes()
    page.evaluate(
        """bytes => {
            const files = new DataTransfer();
            files.items.add(new File([new Uint8Array(bytes)], "steps.rec"));
            const given = {dataTransfer: files, cancelable: true};
            for (const what of ["dragover", "drop"]) window.dispatchEvent(new DragEvent(what, given));
        }""",
        list(body),
    )
    mode(page, "replay")
    assert page.is_hidden("#drop")
    page.click("#leave")
    mode(page, "live")


# ---------------------------------------------------------------------------------------------------------------- options


def test_every_sampling_option_is_there_with_its_bounds(page: Any) -> None:
    """What the types say of requests, the form offers; and a number field's bounds are where the engine draws the line."""
    names = set(page.eval_on_selector_all("label.field [name]", "found => found.map(f => f.name)"))
    sampling = {f for f in SamplingParams.__struct_fields__ if f not in SETTLED} - {"grammar"}
    routes = {"echo", "best_of", "use_beam_search", "length_penalty", "truncate_prompt_tokens", "truncation_side",
              "add_special_tokens", "cache_salt", "priority", "structured_outputs"}  # fmt: skip
    assert names == sampling | routes
    assert names <= {f.name for f in msgspec.structs.fields(CompletionBody)}
    bounds = page.eval_on_selector_all(
        "label.field input[type=number]", "found => found.map(f => [f.name, f.min, f.max])"
    )
    checked = 0
    for name, low, high in bounds:
        if name not in sampling:
            continue
        whole = isinstance(getattr(SamplingParams(), name), int) or name in ("max_tokens", "logprobs", "prompt_logprobs")
        kind, past = (int, 1) if whole else (float, 0.001)
        for text, beyond in ((low, -past), (high, past)):
            if text == "":
                continue
            open_end = {"top_p": 0.001, "repetition_penalty": 0.001}.get(name, 0) if text == low else 0  # over 0, not 0
            inside = kind(float(text) + open_end)
            SamplingParams(**{name: inside, **({"max_tokens": 9} if name == "min_tokens" else {})})
            with pytest.raises(InvalidRequest):
                SamplingParams(**{name: kind(float(text) + beyond)})
            checked += 1
    assert checked >= 20


def test_the_engines_own_explanation_is_shown(page: Any, server: LiveServer) -> None:
    page.click("#send")
    until(page, "document.querySelector('#talk .link')")
    wait_idle(page)
    page.click("#talk .link")
    until(page, "document.querySelector('#looked .bar')")
    name = page.inner_text("#looked dd >> nth=0")
    told = httpx.get(f"{server.url}/requests/{name}").json()
    phases = page.eval_on_selector_all("#looked table:first-of-type tbody tr", "rows => rows.map(r => r.cells[0].textContent)")
    assert phases[: len(told["phases"])] == [p["name"] for p in told["phases"]]
    assert f"steps\n{told['steps']}" in page.inner_text("#looked")


def test_another_server_in_its_place_is_found(visit: Callable[..., Any]) -> None:
    with serve("--num-gpu-blocks-override", "60") as first:
        port = first.url.rsplit(":", 1)[1]
        page = visit(first.url, may_log="net::ERR|Failed to load|TypeError: network error|stream")
        live(page)
        page.click("#eight")
        wait_idle(page)
        seen = page.evaluate("glass.records.length")
    until(page, "document.querySelector('#status').className === 'off'")
    page.click("#send")
    page.wait_for_selector("#problem:not([hidden])")
    assert page.inner_text("#problem") == "The server does not answer; is it still running?"
    with serve("--num-gpu-blocks-override", "80", "--port", port):
        until(page, "document.querySelector('#status').textContent.trim() === 'live' && glass.state.blocks.total === 79")
        assert page.evaluate("glass.records.length") < seen
        page.click("#eight")
        until(page, "glass.records.some(r => r.rows.length === 8)")
        wait_idle(page)
