"""Texts that say the same over and over end; what is looked at is their tokens, and nothing but these."""

import random

import pytest
import token_runner
from scheduler_bench import Bench

from minivllm.errors import InvalidRequest
from minivllm.scheduler.repetition import Repetition
from minivllm.types import MAX_PATTERN, RepetitionDetection


def repeats(output: list[int], asked: RepetitionDetection) -> bool:
    """Word for word: some pattern of an allowed size stands at the end, ``min_count`` times."""
    for size in range(max(asked.min_pattern_size, 1), asked.max_pattern_size + 1):
        whole = size * asked.min_count
        if len(output) >= whole and output[-whole:] == output[-size:] * asked.min_count:
            return True
    return False


def test_what_is_found_is_what_stands_there() -> None:
    """Texts of few different tokens, and of patterns with a flaw now and then, beside prompts that must not count."""
    chance, found, missed = random.Random(3), 0, 0
    for _ in range(600):
        most = chance.randrange(1, 9)
        asked = RepetitionDetection(most, chance.randrange(most + 1), chance.randrange(2, 5))
        pattern = [chance.randrange(3) for _ in range(chance.randrange(1, 10))]
        prompt = pattern * chance.randrange(4) or [1]
        state, known = Repetition(asked, prompt, len(prompt)), list(prompt)
        for i in range(40):
            known.append(pattern[i % len(pattern)] if chance.random() < 0.93 else chance.randrange(3))
            expected = repeats(known[len(prompt) :], asked)
            assert state.goes_round(known) == expected
            found, missed = found + expected, missed + (not expected)
            if chance.random() < 0.1:  # as after a restart: from the tokens alone
                state = Repetition(asked, known, len(prompt))
    assert found > 500 and missed > 500


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("num_draft_tokens", [0, 3])
def test_the_engine_ends_it(monkeypatch: pytest.MonkeyPatch, overlap: int, num_draft_tokens: int) -> None:
    """Whatever interrupts it, a text ends at the same token; who did not ask goes on."""
    plain = token_runner.next_token
    monkeypatch.setattr(token_runner, "next_token", lambda mark, vocab, seed: plain(mark, 2, seed))
    asked = RepetitionDetection(5, 3, 3)
    ends: dict[int, list[int]] = {}
    for num_blocks in (300, 54):  # with few blocks, rows are taken away
        bench = Bench(num_blocks, overlap, num_draft_tokens=num_draft_tokens)
        for seed in range(6):
            bench.add(f"r{seed}", (1, 0, 1), 200, sampling={"seed": seed, "repetition_detection": asked})
        bench.add("free", (1, 0, 1), 200)
        bench.run()
        bench.assert_idle()
        reasons = {e.id: (e.finish_reason, e.stop_reason) for e in bench.events if e.finish_reason}
        assert reasons.pop("free") == ("length", None) and len(bench.text("free")) == 200
        assert list(reasons.values()).count(("repetition", "repetition_detected")) >= 4
        for seed in range(6):
            text = bench.text(f"r{seed}")
            assert not any(repeats(text[:end], asked) for end in range(len(text)))
            assert reasons[f"r{seed}"][0] == ("repetition" if repeats(text, asked) else "length")
            assert ends.setdefault(seed, text) == text
        if num_blocks == 54:
            assert sum(len(record.preempted) for record in bench.records) > 0


def test_min_tokens_and_prior_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_runner, "next_token", lambda mark, vocab, seed: 9)
    asked = RepetitionDetection(max_pattern_size=1, min_count=4)
    bench = Bench()
    bench.add("plain", (9, 9, 9), 20, sampling={"repetition_detection": asked})
    bench.add("later", (9, 9, 9), 20, sampling={"repetition_detection": asked, "min_tokens": 11})
    bench.add("again", (9, 9, 9), 20, sampling={"repetition_detection": asked}, prior_output_ids=(9, 9, 9))
    bench.add("last", (9, 9, 9), 4, sampling={"repetition_detection": asked})
    bench.run()
    assert {name: len(bench.text(name)) for name in bench.requests} == {"plain": 4, "later": 11, "again": 1, "last": 4}
    assert [e.finish_reason for e in bench.events if e.id == "last"][-1] == "length", "the limit is named first"


def test_ranges() -> None:
    for values in ((-1, 0, 2), (MAX_PATTERN + 1, 0, 2), (3, 4, 2), (3, -1, 2), (3, 0, 1), (3, 0, 2**31), (0, 0, 2)):
        with pytest.raises(InvalidRequest) as caught:
            RepetitionDetection(*values)
        assert caught.value.param == "repetition_detection"
    assert RepetitionDetection() == RepetitionDetection(0, 0, 0)
