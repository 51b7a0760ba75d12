"""``mini-vllm trace FILE -o trace.json``: a recording as a picture of time, for https://ui.perfetto.dev."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from minivllm.cli.options import Parser
from minivllm.errors import InvalidOption
from minivllm.observe.recording import Recording
from minivllm.observe.trace import trace_events


def run(argv: Sequence[str]) -> int:
    """Write the trace."""
    parser = Parser("trace", "Draw a recording (--record-steps) as a trace in Chrome's format, which Perfetto opens.", "FILE [options]")
    parser.add_argument("file", metavar="FILE", help="recording that mini-vllm serve --record-steps wrote")
    parser.add_argument("-o", "--output", default="trace.json", help="file to write [trace.json]; - is stdout")
    found = parser.read(argv)
    recording = Recording(found.file)
    events, header = trace_events(recording, recording.header.model), recording.header
    told = {"model": header.model, "started_unix_s": header.started_unix_s, "device": header.info.device}
    if found.output == "-":
        write(sys.stdout.buffer, events, told)
        return 0
    try:
        with Path(found.output).open("wb") as file:
            count = write(file, events, told)
    except OSError as error:
        raise InvalidOption(f"{found.output} cannot be written: {error.strerror}; name another file with -o.") from None
    sys.stdout.write(f"{found.output} has {count} events; open it at https://ui.perfetto.dev\n")
    return 0


def write(file: BinaryIO, events: Iterable[dict[str, Any]], told: dict[str, Any]) -> int:
    """Write the file a piece at a time; the number of events."""
    encode, count = msgspec.json.Encoder().encode, 0
    file.write(b'{"displayTimeUnit":"ms","otherData":' + encode(told) + b',"traceEvents":[\n')
    for event in events:
        file.write((b",\n" if count else b"") + encode(event))
        count += 1
    file.write(b"\n]}\n")
    return count
