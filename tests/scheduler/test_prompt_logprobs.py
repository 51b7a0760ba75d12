"""Logprobs of a prompt are told once and in order, also where a prompt is computed again in other chunks than before."""

import pytest
from scheduler_bench import Bench


@pytest.mark.parametrize("overlap", [0, 1])
def test_told_once_across_other_chunks(overlap: int) -> None:
    bench = Bench(overlap=overlap, max_num_seqs=4, max_num_batched_tokens=8)
    bench.add("neighbour", (9,), 100)
    prompt = tuple(range(10, 40))
    bench.step()
    bench.add("long", prompt, 3, sampling={"prompt_logprobs": 0})

    def events() -> list[int]:
        return [found.rank for e in bench.events if e.id == "long" for found in e.prompt_logprobs]

    while len(events()) < 10:
        bench.step()
    told = events()
    assert told == list(prompt[1 : 1 + len(told)]) and len(told) % 7 == 0, "chunks of 7: the neighbour has a token of each step"
    bench.runner.fail_steps.update(range(bench.runner.steps, bench.runner.steps + 1))
    bench.engine.abort(["neighbour"])
    bench.run()
    assert events() == list(prompt[1:])
    assert len(bench.text("long")) == 3
    starts = [row.start for record in bench.records for row in record.rows if row.id == "long"]
    assert starts.count(0) == 2 and 7 in starts and 8 in starts, "it began again, in chunks of 8"
    bench.assert_idle()
