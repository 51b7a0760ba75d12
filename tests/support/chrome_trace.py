"""A strict reader of Chrome's trace event format ("Trace Event Format", the JSON object form): what it says of the kinds of
events that we write, and of slices and flows that viewers would otherwise drop without a word."""

from collections import defaultdict
from typing import Any

METADATA = {"process_name": "name", "thread_name": "name", "thread_sort_index": "sort_index"}


class Trace:
    """The events of a document that is right; raises ``AssertionError`` for one that is not."""

    def __init__(self, document: dict[str, Any]) -> None:
        assert set(document) <= {"traceEvents", "displayTimeUnit", "otherData"}
        assert document.get("displayTimeUnit", "ms") in ("ms", "ns")
        self.events: list[dict[str, Any]] = document["traceEvents"]
        self.slices: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
        self.names: dict[tuple[int, int], str] = {}
        self.flows: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for event in self.events:
            self._event(event)
        for track in self.slices.values():
            _check_nesting(track)
        for flow in self.flows.values():
            self._check_flow(flow)

    def _event(self, event: dict[str, Any]) -> None:
        kind = event["ph"]
        assert isinstance(event["name"], str) and event["name"]
        assert type(event["pid"]) is int and type(event["tid"]) is int
        assert isinstance(event.get("args", {}), dict)
        at = (event["pid"], event["tid"])
        if kind == "M":
            value = event["args"][METADATA[event["name"]]]
            if event["name"] == "thread_name":
                assert at not in self.names and isinstance(value, str)
                self.names[at] = value
            return
        assert type(event["ts"]) in (int, float) and event["ts"] >= 0
        if kind == "X":
            assert type(event["dur"]) in (int, float) and event["dur"] >= 0
            self.slices[at].append(event)
        elif kind == "C":
            assert event["args"] and all(type(value) in (int, float) for value in event["args"].values())
        elif kind == "i":
            assert event["s"] in ("g", "p", "t")
        elif kind in ("s", "t", "f"):
            assert event.get("bp", "e") == "e" and (kind == "s" or "bp" in event)
            self.flows[event["id"]].append(event)
        else:
            raise AssertionError(f"an event of the kind {kind!r}")

    def _check_flow(self, flow: list[dict[str, Any]]) -> None:
        """One begin, one end, steps between; each lies in a slice, which is what an arrow is drawn from or to."""
        kinds = "".join(event["ph"] for event in flow)
        assert kinds == "s" + "t" * (len(kinds) - 2) + "f", kinds
        assert len({(event["name"], event["cat"]) for event in flow}) == 1
        stamps = [event["ts"] for event in flow]
        assert stamps == sorted(stamps)
        for event in flow:
            track = self.slices[event["pid"], event["tid"]]
            assert any(s["ts"] <= event["ts"] <= s["ts"] + s["dur"] for s in track), event


def _check_nesting(track: list[dict[str, Any]]) -> None:
    """Slices of a track lie in one another or apart."""
    open_until: list[float] = []
    for event in sorted(track, key=lambda e: (e["ts"], -e["dur"])):
        while open_until and open_until[-1] <= event["ts"]:
            open_until.pop()
        end = event["ts"] + event["dur"]
        assert not open_until or end <= open_until[-1], f"{event} crosses the end of the slice around it"
        open_until.append(end)
