"""Scheduler and KV bookkeeping, moved at random for long: every invariant after every move, and something always gets on.

    python -m benchmarks.reliability.state_machine [--histories 2000] [--steps 200000] [--seed 0]

Drives the machine of ``tests/scheduler/test_state_machine.py`` with moves from a seeded generator instead of hypothesis: that
is faster, and a history can be repeated by its number. Ends with exit code 1 at the first broken promise, naming the history.
"""

import argparse
import logging
import random
import sys
import time
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parents[2] / "tests"
sys.path[:0] = [str(TESTS / "support"), str(TESTS / "scheduler")]

from test_state_machine import CURSES, HEADS, VOCAB, SchedulerMachine  # noqa: E402

MOVES = (  # name, how often
    ("run_a_little", 30), ("add", 25), ("plan", 12), ("collect", 8), ("fork", 6), ("abort", 3), ("poison", 3), ("curse", 3),
    ("lose_memory", 2),
)  # fmt: skip


def start(machine: SchedulerMachine, rng: random.Random) -> None:
    machine.start(
        num_blocks=rng.randint(12, 40), max_num_seqs=rng.randint(1, 6), budget=rng.randint(12, 40),
        drafts=rng.choice((0, 0, 1, 4)), depth=rng.randint(0, 2), batching=rng.choice(("mixed", "prefill-first", "separate")),
        scheduling=rng.choice(("fcfs", "priority")), caching=rng.random() < 0.7, seed=rng.randint(0, 99),
    )  # fmt: skip


def move(machine: SchedulerMachine, name: str, rng: random.Random) -> bool:
    """Make a move, if it can be made now."""
    pick = rng.getrandbits(30)
    if name == "add":
        machine.add(
            head=rng.choice(HEADS), tail=[rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))],
            max_tokens=rng.randint(1, 20), salt=rng.choice(("", "", "other")), priority=rng.randint(0, 2),
            eos=rng.random() < 0.5, seed=rng.randint(0, 2), tells=rng.random() < 0.3, guided=rng.random() < 0.4,
        )  # fmt: skip
    elif name == "run_a_little":
        machine.run_a_little(steps=rng.randint(1, 6))
    elif name == "lose_memory":
        machine.lose_memory(tokens=rng.choice((None, None, 8, 16, 24)), rows=rng.choice((None, None, 1, 2)))
    elif name == "plan" and len(machine.flights) <= machine.depth:
        machine.plan(fails=rng.randint(0, 9))
    elif name == "collect" and machine.flights:
        machine.collect()
    elif name in ("fork", "abort", "poison", "curse") and machine._open():
        more = {"fork": {"seed": rng.randint(3, 5), "more": rng.randint(1, 8)}, "curse": {"curse": rng.choice(CURSES)}}
        getattr(machine, name)(pick=pick, **more.get(name, {}))
    else:
        return False
    return True


def history(number: int, seed: int, steps: int, moves: Counter[str]) -> SchedulerMachine:
    """One history of at least ``steps`` steps."""
    rng = random.Random(f"{seed}/{number}")
    machine = SchedulerMachine()
    start(machine, rng)
    names, weights = [name for name, _ in MOVES], [weight for _, weight in MOVES]
    while machine.num_steps < steps:
        (name,) = rng.choices(names, weights)
        moves[name] += move(machine, name, rng)
        machine.whole()
    machine.teardown()
    return machine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--histories", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first history")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)  # of the faults that are made here
    each = -(-arguments.steps // arguments.histories)
    begin_s, moves, ends, steps = time.monotonic(), Counter[str](), Counter[str](), 0
    for number in range(arguments.first, arguments.first + arguments.histories):
        try:
            machine = history(number, arguments.seed, each, moves)
        except BaseException:
            print(f"BROKEN in history {number}: --first {number} --histories 1 --steps {each} --seed {arguments.seed}")
            raise
        steps += machine.num_steps
        ends.update(machine.ends.values())
        ends["abort"] += len(machine.aborted)
    print(f"{arguments.histories} histories, {steps} steps in {time.monotonic() - begin_s:.0f} s; no promise was broken")
    print("moves:", ", ".join(f"{name} {count}" for name, count in moves.most_common()))
    print("requests ended:", ", ".join(f"{name} {count}" for name, count in ends.most_common()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
