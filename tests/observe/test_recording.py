"""Recordings: what is read is what was added, also after a kill, a full disk and damage."""

import gzip
import io
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from scheduler_bench import Bench

from minivllm.errors import BadRecording, InvalidOption
from minivllm.observe.recording import Recorder, Recording
from minivllm.records import StepRecord


@pytest.fixture(scope="module")
def bench() -> Bench:
    bench = Bench(num_blocks=14)
    for i in range(6):
        bench.add(f"r{i}", tuple(range(i, i + 9)), max_tokens=9)
    bench.run()
    return bench


def record_all(path: Path, bench: Bench, **more: Any) -> None:
    recorder = Recorder(path, **more)
    recorder.begin(bench.engine.info, "fox")
    for record in bench.records:
        recorder.add(record)
    recorder.close()
    recorder.close()


def test_what_is_read_is_what_was_added(tmp_path: Path, bench: Bench) -> None:
    path = tmp_path / "steps"
    path.write_bytes(b"what was there before" * 1000)
    record_all(path, bench)
    recording = Recording(path)
    assert (recording.header.info, recording.header.model) == (bench.engine.info, "fox")
    assert abs(recording.header.started_unix_s - time.time()) < 60 and recording.header.started_s <= time.monotonic()
    assert list(recording) == bench.records
    assert list(recording) == bench.records, "as often as one likes"


def test_any_program_can_read_it(tmp_path: Path, bench: Bench) -> None:
    """gzip, then numbers and maps of MessagePack in turn; maps have the fields' names, and no field that has its default."""
    record_all(tmp_path / "steps", bench)
    stream = io.BytesIO(gzip.decompress((tmp_path / "steps").read_bytes()))
    found = []
    while length := stream.read(5):
        found.append(msgspec.msgpack.decode(stream.read(msgspec.msgpack.decode(length))))
    assert (found[0]["format"], found[0]["version"], found[0]["info"]["block_size"]) == ("mini-vllm steps", 1, 4)
    assert len(found) == 1 + len(bench.records)
    assert found[1]["rows"][0] == {
        "id": "r0", "start": 0, "num_tokens": 9, "kind": "prefill", "blocks": [[1, 2, 3]], "tokens": list(range(9)),
    }  # fmt: skip
    assert "preempted" not in found[1]


CHILD = """
import sys, time
sys.path[:0] = sys.argv[2:]
from scheduler_bench import Bench
from minivllm.observe.recording import Recorder
bench = Bench()
recorder = Recorder(sys.argv[1], flush_s=0.05)
recorder.begin(bench.engine.info, "fox")
bench.add("a", tuple(range(9)), max_tokens=100)
bench.run()
for record in bench.records:
    recorder.add(record)
time.sleep(1)
print("written", flush=True)
for record in bench.records:
    recorder.add(record)
if sys.argv[2] != "exit":
    time.sleep(60)
"""


def child(path: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(path), *more, *sys.path]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def test_of_a_process_that_is_killed_what_was_flushed_can_be_read(tmp_path: Path) -> None:
    process = child(tmp_path / "steps")
    assert process.stdout is not None
    assert process.stdout.readline() == b"written\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    found = list(Recording(tmp_path / "steps"))
    assert len(found) >= 100 and [record.step for record in found[:100]] == list(range(100))


def test_of_a_program_that_ends_everything_is_there(tmp_path: Path) -> None:
    process = child(tmp_path / "steps", "exit")
    assert process.wait(60) == 0
    assert [record.step for record in Recording(tmp_path / "steps")] == [*range(100), *range(100)]
    gzip.decompress((tmp_path / "steps").read_bytes())  # raises when the end is missing


def test_an_end_that_is_missing_is_no_damage(tmp_path: Path, bench: Bench) -> None:
    path = tmp_path / "steps"
    record_all(path, bench)
    whole = path.read_bytes()
    counts = set()
    for size in range(len(whole) // 3, len(whole), 37):
        path.write_bytes(whole[:size])
        found = list(Recording(path))
        assert found == bench.records[: len(found)]
        counts.add(len(found))
    assert max(counts) >= len(bench.records) - 1 and len(counts) > 3


packed_at_no_time = partial(gzip.compress, mtime=0)  # a test's name must not depend on the clock


@pytest.mark.parametrize("body", [
    b"", b"no gzip at all", packed_at_no_time(b""), packed_at_no_time(b"a text about nothing"), packed_at_no_time(bytes(9)),
    packed_at_no_time(b"\xce\x00\x00\x00\x01\xc0"), packed_at_no_time(b"\xce\xff\xff\xff\xff" + b"x" * 99),
    packed_at_no_time(b"\xce\x00\x00\x00\x05hallo"),
])  # fmt: skip
def test_a_file_that_is_none_is_told(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "steps"
    path.write_bytes(body)
    with pytest.raises(BadRecording, match="no recording of steps"):
        Recording(path)


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadRecording, match="cannot be read: No such file"):
        Recording(tmp_path / "nothing")
    with pytest.raises(BadRecording, match="cannot be read: Is a directory"):
        Recording(tmp_path)


def test_another_version_is_told(tmp_path: Path, bench: Bench) -> None:
    path = tmp_path / "steps"
    record_all(path, bench)
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(b"version\x01", b"version\x02", 1)))
    with pytest.raises(BadRecording, match="another form"):
        Recording(path)


def test_damage_is_told_where_it_is(tmp_path: Path, bench: Bench) -> None:
    path = tmp_path / "steps"
    record_all(path, bench)
    plain = gzip.decompress(path.read_bytes())
    at = plain.index(b"collected_s", plain.index(b"collected_s", plain.index(b"collected_s") + 1) + 1)
    path.write_bytes(gzip.compress(plain[:at] + b"\xc1" + plain[at + 1 :]))
    found: list[StepRecord] = []
    with pytest.raises(BadRecording, match="is damaged at its record 2: "):
        found.extend(Recording(path))
    assert found == bench.records[: len(found)]
    packed = gzip.compress(plain)
    middle = len(packed) // 2
    path.write_bytes(packed[:middle] + bytes([packed[middle] ^ 255]) + packed[middle + 1 :])
    with pytest.raises(BadRecording, match="damaged"):
        list(Recording(path))


def test_a_place_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match=r"--record-steps .* cannot be written \(No such file or directory\)"):
        Recorder(tmp_path / "nowhere" / "steps")
    (tmp_path / "steps").write_bytes(b"of another day")
    Recorder(tmp_path / "steps").close()
    assert (tmp_path / "steps").read_bytes() == b"of another day", "the engine did not start, say"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no disk that is always full")
def test_a_full_disk_is_told_once_and_disturbs_nobody(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "minivllm"):
        recorder = Recorder("/dev/full", flush_s=0.01)
        recorder.begin(bench.engine.info, "fox")
        deadline = time.monotonic() + 20
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.01)
        for record in bench.records:
            recorder.add(record)
        recorder.close()
    assert [r.message for r in caplog.records] == ["the recording of steps to /dev/full ends here: No space left on device"]


def test_a_slow_disk_ends_the_recording_and_not_the_memory(
    tmp_path: Path, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "minivllm"):
        record_all(tmp_path / "steps", bench, flush_s=60, most_waiting=5)
    assert [r.message for r in caplog.records] == [
        f"the recording of steps to {tmp_path / 'steps'} ends here: the disk does not keep up"
    ]
    assert list(Recording(tmp_path / "steps")) == bench.records[:4], "five with the header"


def test_generating_from_a_program_can_be_recorded(tmp_path: Path, bundled_model: Path) -> None:
    from minivllm.llm import LLM
    from minivllm.types import SamplingParams

    path = tmp_path / "steps"
    llm = LLM(str(bundled_model), device="cpu", num_threads=1, num_gpu_blocks_override=40, record_steps=str(path))
    info = llm.info
    (done,) = llm.generate(["Once upon a time"], SamplingParams(max_tokens=5, temperature=0.0))
    llm.close()
    recording = Recording(path)
    assert recording.header.info == info
    records = list(recording)
    assert records[0].rows[0].tokens == done.prompt_ids
    assert [token for record in records for tokens in record.outputs for token in tokens] == done.token_ids
