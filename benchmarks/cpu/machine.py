"""What the operating system knows about a measurement: the machine, peak memory, and who else was using it.

A shared machine is not quiet. So each measurement says which share of the cores went to anything but the contender and its
client while it ran (``others_share``; time the hypervisor took away counts too): a figure taken beside a busy neighbour is seen
as such. All from ``/proc``; Linux only.
"""

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROC = Path("/proc")
BUSY_SHARE = 0.05  # of the cores, used by others: a measurement above it is called disturbed
QUIET_WINDOW_S = 1.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def describe_machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory."""
    found = re.search(r"model name\s*:\s*(.+)", (PROC / "cpuinfo").read_text())
    flags = set((PROC / "cpuinfo").read_text().split())
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile")
    return {
        "cpu": found.group(1) if found else os.uname().machine,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "instructions": [name for name in wanted if name in flags],
    }


def process_tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for parent in found:  # grows while it is gone through
        for task in (PROC / str(parent) / "task").glob("*/children"):
            try:
                found += [int(child) for child in task.read_text().split()]
            except OSError:  # it ended meanwhile
                continue
    return found


def peak_memory_bytes(pid: int) -> int:
    """The most memory that each process of the tree ever held, added up (VmHWM: pages two of them share count twice)."""
    total = 0
    for member in process_tree(pid):
        try:
            found = re.search(r"VmHWM:\s+(\d+) kB", (PROC / str(member) / "status").read_text())
        except OSError:
            continue
        total += int(found.group(1)) * 1024 if found else 0
    return total


def _tree_cpu_s(pid: int) -> float:
    """CPU time of a live process tree, exited children included."""
    ticks = 0
    for member in process_tree(pid):
        try:
            fields = (PROC / str(member) / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        ticks += sum(int(n) for n in fields[11:15])  # utime, stime and those of its children
    return ticks / TICKS_PER_S


def _busy_s() -> float:
    """CPU time that was used, by anybody, since the machine started."""
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = (
        int(n) for n in (PROC / "stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + irq + softirq + steal) / TICKS_PER_S


@dataclass(frozen=True)
class CpuClock:
    """CPU time at one moment: all of it, and ours (this process and everything it started)."""

    at_s: float
    busy_s: float
    own_s: float

    @classmethod
    def now(cls) -> "CpuClock":
        """Read the clocks."""
        return cls(time.perf_counter(), _busy_s(), _tree_cpu_s(os.getpid()))

    def others_share(self, later: "CpuClock") -> float:
        """Which part of the cores others used between two readings, 0 to 1."""
        others_s = (later.busy_s - self.busy_s) - (later.own_s - self.own_s)
        cores_s = (later.at_s - self.at_s) * (os.cpu_count() or 1)
        return min(max(others_s / cores_s, 0.0), 1.0) if cores_s > 0 else 0.0


def await_quiet(limit_s: float) -> None:
    """Wait until others leave the machine alone for a second, but no longer than the limit."""
    end_s = time.perf_counter() + limit_s
    while time.perf_counter() < end_s:
        before = CpuClock.now()
        time.sleep(QUIET_WINDOW_S)
        if before.others_share(CpuClock.now()) <= BUSY_SHARE:
            return
