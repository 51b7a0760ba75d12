"""Whose fault it is when a step fails and nobody can say so.

All requests of the failed step start over, and are *suspects*. They are tried in two halves, one after the other, while
everybody else waits: a group that fails again is halved again, and who fails alone, for the second time, is the one. A suspect
is cleared once it has come as far as the failed step was to bring it; it then waits until all trials are over, so that only
those on trial hold blocks and the first of them always finds some. One request among n that breaks every step it is part of is
so found in about log2 n failed steps, and nobody else ends. A step that failed by accident costs its requests a recomputation.
"""

from collections import deque
from collections.abc import Collection, Mapping


class Trials:
    """Groups of suspects, by uid. Written by ``Book`` and ``Scheduler``."""

    def __init__(self) -> None:
        self._groups: deque[dict[int, int]] = deque()  # uid -> tokens that must be computed for it to be cleared

    @property
    def group(self) -> Collection[int]:
        """Those on trial now: nobody else may run. Empty: there is no trial."""
        return self._groups[0] if self._groups else ()

    def suspect(self, targets: Mapping[int, int]) -> None:
        """These were in a step that failed; they are tried next, in halves."""
        items, middle = list(targets.items()), len(targets) // 2
        self._groups.extendleft(dict(half) for half in (items[middle:], items[:middle]) if half)

    def target(self, uid: int) -> int:
        """How far a request must come to be cleared; 0: it is no suspect."""
        return next((group[uid] for group in self._groups if uid in group), 0)

    def follow(self, uid: int, fresh_uid: int) -> None:
        """A request began again under another uid."""
        for group in self._groups:
            if uid in group:
                group[fresh_uid] = group.pop(uid)

    def leave(self, uid: int) -> None:
        """A request was cleared, ended, or is about to be suspected anew."""
        if not self._groups:
            return
        for group in self._groups:
            group.pop(uid, None)
        if not all(self._groups):
            self._groups = deque(group for group in self._groups if group)
