"""Frames between server and engine: whole whatever the chunks, and closed to anything unexpected."""

import msgspec
import pytest

from minivllm.child import MAX_FRAME_BYTES, FrameReader, encode
from minivllm.config import Config, make_config
from minivllm.engine.ipc import Abort, Add, FromEngine, Start, Stop, ToEngine
from minivllm.records import EngineOutput
from minivllm.types import GenerateRequest, SamplingParams, TokenEvent


def messages() -> list[object]:
    sampling = SamplingParams(temperature=0.5, stop=("a", "ü"), stop_token_ids=(3,), seed=-(2**63), max_tokens=9)
    request = GenerateRequest(id="r", prompt_ids=(1, 2, 3), sampling=sampling, arrival_s=1.5, cache_salt="s")
    return [Start(make_config(port=9, served_model_name=("a", "b"))), Add(request), Abort(("r", "s")), Stop()]


def test_messages_survive_any_cut_of_the_stream() -> None:
    stream = b"".join(encode(m) for m in messages())  # type: ignore[arg-type]
    for size in (1, 2, 3, 7, 100, len(stream)):
        reader = FrameReader(ToEngine)  # type: ignore[arg-type]
        got = [m for i in range(0, len(stream), size) for m in reader.feed(stream[i : i + size])]
        assert got == messages()


def test_options_arrive_as_they_were_given() -> None:
    config = make_config(model="m", dtype="bfloat16", kv_cache_memory_bytes=1 << 40, batch_invariant=True)
    (start,) = FrameReader(ToEngine).feed(encode(Start(config)))  # type: ignore[arg-type]
    assert isinstance(start, Start)
    assert start.config == config
    assert isinstance(start.config, Config)


@pytest.mark.parametrize("body", [b"\x00", msgspec.msgpack.encode({"type": "run", "code": "1"}), b"\xff" * 9])
def test_anything_else_is_an_error_and_never_code(body: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        FrameReader(ToEngine).feed(len(body).to_bytes(4, "little") + body)  # type: ignore[arg-type]


def test_a_request_that_skips_the_checks_cannot_be_decoded() -> None:
    good = msgspec.msgpack.decode(encode(messages()[1])[4:])  # type: ignore[arg-type]
    good["request"]["sampling"]["temperature"] = 99.0
    body = msgspec.msgpack.encode(good)
    with pytest.raises(Exception, match="temperature"):
        FrameReader(ToEngine).feed(len(body).to_bytes(4, "little") + body)  # type: ignore[arg-type]


def test_a_length_beyond_reason_is_refused_before_it_is_waited_for() -> None:
    with pytest.raises(ValueError, match="announced"):
        FrameReader(ToEngine).feed((MAX_FRAME_BYTES + 1).to_bytes(4, "little"))  # type: ignore[arg-type]


def test_outputs_keep_their_defaults_off_the_wire() -> None:
    output = EngineOutput((TokenEvent("r", (5,)),))
    (back,) = FrameReader(FromEngine).feed(encode(output))  # type: ignore[arg-type]
    assert back == output
