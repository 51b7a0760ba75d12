"""Events become outputs: text, stop strings, reasons, counts."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.text.outputs import OutputProcessor
from minivllm.text.tokenizer import Tokenizer
from minivllm.types import FinishReason, RequestOutput, SamplingParams, TokenEvent

TEXT = "Once upon a time 你好 😀 the forest"


def run(
    tokenizer: Tokenizer, ids: list[int], sampling: SamplingParams, *, sizes: int = 1, finish: FinishReason | None = "length",
    stop_reason: int | None = None,
) -> tuple[list[RequestOutput], list[str]]:
    """Feed ids as events of a size, the last one final; after the end the processor must be empty."""
    processor = OutputProcessor(tokenizer)
    processor.add("r", [0, 1], sampling)
    outputs: list[RequestOutput] = []
    aborts: list[str] = []
    for at in range(0, len(ids), sizes):
        last = at + sizes >= len(ids)
        event = TokenEvent("r", tuple(ids[at : at + sizes]), finish if last else None, stop_reason if last else None, 1)
        new, abort = processor.process([event])
        outputs += new
        aborts += abort
    if finish is not None:
        assert len(processor) == 0
    return outputs, aborts


def text_of(outputs: list[RequestOutput]) -> str:
    return "".join(o.text for o in outputs)


def test_plain_stream(trained_tokenizer: Tokenizer) -> None:
    ids = trained_tokenizer.encode(TEXT)
    outputs, aborts = run(trained_tokenizer, ids, SamplingParams())
    assert text_of(outputs) == TEXT
    assert [o.num_output for o in outputs] == list(range(1, len(ids) + 1))
    assert {(o.num_prompt, o.num_cached) for o in outputs} == {(2, 1)}
    assert [t for o in outputs for t in o.token_ids] == ids
    assert [o.finish_reason for o in outputs] == [None] * (len(ids) - 1) + ["length"]
    assert not aborts


@pytest.mark.parametrize("sizes", [1, 2, 5, 1000])
@pytest.mark.parametrize("include", [False, True])
def test_stop_string_over_token_cuts(trained_tokenizer: Tokenizer, sizes: int, include: bool) -> None:
    ids = trained_tokenizer.encode(TEXT)
    stop = "me 你"
    outputs, aborts = run(
        trained_tokenizer, ids, SamplingParams(stop=(stop, "zzz"), include_stop_str_in_output=include), sizes=sizes
    )
    assert text_of(outputs) == TEXT[: TEXT.index(stop) + (len(stop) if include else 0)]
    last = outputs[-1]
    assert (last.finish_reason, last.stop_reason) == ("stop", stop)
    counted = [t for o in outputs for t in o.token_ids]
    assert last.num_output == len(counted) < len(ids)
    assert trained_tokenizer.decode(counted).endswith(stop)  # up to the token that completed it, none after
    assert not trained_tokenizer.decode(counted[:-1]).endswith(stop)
    assert aborts == ([] if sizes == 1000 else ["r"])  # nothing to abort where the engine had ended it itself


def test_later_events_of_a_stopped_request_are_dropped(trained_tokenizer: Tokenizer) -> None:
    ids = trained_tokenizer.encode("a time a time")
    processor = OutputProcessor(trained_tokenizer)
    processor.add("r", [0], SamplingParams(stop=("time",)))
    outputs, aborts = processor.process([TokenEvent("r", (i,)) for i in ids])
    assert aborts == ["r"]
    assert text_of(outputs) == "a "
    assert processor.process([TokenEvent("r", (5,), "abort"), TokenEvent("unknown", (5,))]) == ([], [])


@pytest.mark.parametrize("finish", ["length", "abort", "error"])
def test_held_text_comes_out_at_the_end(trained_tokenizer: Tokenizer, finish: FinishReason) -> None:
    ids = trained_tokenizer.encode("a tim") + [next(i for i in range(400) if trained_tokenizer.token_bytes(i) == b"\xe4")]
    outputs, aborts = run(trained_tokenizer, ids, SamplingParams(stop=("time",)), finish=finish)
    assert text_of(outputs) == "a tim\ufffd"
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == (finish, None)
    assert not aborts


def test_error_passes_through(trained_tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(trained_tokenizer)
    processor.add("r", [0], SamplingParams())
    (output,), _ = processor.process([TokenEvent("r", (), "error", error="logits were not finite")])
    assert (output.finish_reason, output.error, output.text, output.num_output) == ("error", "logits were not finite", "", 0)


def test_eos_and_stop_tokens_count_but_are_not_shown(trained_tokenizer: Tokenizer) -> None:
    ids = trained_tokenizer.encode("a time")
    eos = trained_tokenizer.eos_id
    assert eos is not None
    for sampling, end, stop_reason, text in (
        (SamplingParams(), eos, None, "a time"),
        (SamplingParams(skip_special_tokens=False), eos, None, "a time"),
        (SamplingParams(skip_special_tokens=False, include_stop_str_in_output=True), eos, None, "a time<|end|>"),
        (SamplingParams(include_stop_str_in_output=True), eos, None, "a time"),
        (SamplingParams(stop_token_ids=(ids[0],)), ids[0], ids[0], "a time"),
        (SamplingParams(stop_token_ids=(ids[0],), include_stop_str_in_output=True), ids[0], ids[0], "a timea"),
    ):
        outputs, _ = run(trained_tokenizer, [*ids, end], sampling, finish="stop", stop_reason=stop_reason)
        assert text_of(outputs) == text
        assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", stop_reason)
        assert outputs[-1].num_output == len(ids) + 1


def test_min_tokens_lets_early_stop_strings_pass(trained_tokenizer: Tokenizer) -> None:
    ids = trained_tokenizer.encode("a b a b a b", add_special_tokens=False)
    pieces = [trained_tokenizer.token_text(i) for i in ids]
    for min_tokens in range(len(ids)):
        early = "".join(pieces[:min_tokens])
        outputs, _ = run(trained_tokenizer, ids, SamplingParams(stop=("b",), min_tokens=min_tokens))
        rest = "".join(pieces[min_tokens:])
        expected = early + (rest[: rest.index("b")] if "b" in rest else rest)
        assert text_of(outputs) == expected
        assert outputs[-1].finish_reason == ("stop" if "b" in rest else "length")


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_tokens_any_events_any_stops(trained_tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Text equals the whole text, cut at the stop string that is completed first; the same whatever the event sizes."""
    seed, sizes = data.draw(st.integers(0, 2**32)), data.draw(st.integers(1, 9))
    ids = [random.Random(seed + i).randrange(trained_tokenizer.vocab_size) for i in range(25)]
    whole = trained_tokenizer.decode(ids)
    at = data.draw(st.integers(0, max(0, len(whole) - 1)))
    stop = whole[at : at + data.draw(st.integers(1, 6))] or "x"
    outputs, _ = run(trained_tokenizer, ids, SamplingParams(stop=(stop,)), sizes=sizes)
    assert text_of(outputs) == whole.partition(stop)[0]


def test_drop_and_double_ids(trained_tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(trained_tokenizer)
    processor.add("r", [0], SamplingParams())
    with pytest.raises(ValueError, match="open already"):
        processor.add("r", [0], SamplingParams())
    processor.drop("r")
    processor.drop("r")
    assert processor.process([TokenEvent("r", (5,))]) == ([], [])
