"""One walk over the records; a request that is there and has no row has a reason, its own or everybody's."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from minivllm.records import StepRecord


def where(records: Sequence[StepRecord], name: str) -> dict[str, Any]:
    """What became of a request."""
    told: dict[str, Any] = {"queued": 0, "prefill": 0, "decode": 0, "away": 0, "recomputed": 0}
    why: Counter[str] = Counter()
    computed: Counter[int] = Counter()
    here = False
    for record in records:
        here = here or any(arrival.id == name for arrival in record.arrived)
        row = next((row for row in record.rows if row.id == name), None)
        if row is not None:
            told[row.kind] += 1
            computed.update(range(row.start, row.start + row.num_tokens))
        elif here and record.rows:
            own = next((wait.reason for wait in record.waits if wait.id == name), record.rest_waits)
            why[own.partition(":")[0]] += 1
            told["away" if computed else "queued"] += 1
        here = here and all(end.id != name for end in record.finished)
    told["recomputed"] = sum(times - 1 for times in computed.values())
    return {**told, "why": dict(why)}
