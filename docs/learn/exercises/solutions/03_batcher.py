"""Between two steps: whoever is done leaves, whoever waits takes the place."""

from collections import deque


def schedule(requests: list[tuple[int, int]], num_rows: int) -> list[list[int]]:
    """The steps in which each request has a row."""
    steps: list[list[int]] = [[] for _ in requests]
    waiting, running, step = deque(range(len(requests))), list[int](), 0
    while waiting or running:
        while waiting and len(running) < num_rows and requests[waiting[0]][0] <= step:
            running.append(waiting.popleft())
        for i in running:
            steps[i].append(step)
        running = [i for i in running if len(steps[i]) < requests[i][1]]
        step += 1
    return steps
