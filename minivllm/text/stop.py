"""Stop strings, found in a stream of text however it was cut into tokens.

All stop strings of a request make one Aho-Corasick automaton (Aho and Corasick, 1975): a trie of the strings with, at each
node, a link to the longest suffix that is in the trie too. Its state after some text *is* the longest end of that text that
could still become a stop string, so the state's depth is exactly how much has to be held back, and the held text is the
state's own path: nothing else is stored. Each character costs O(1) amortised, whatever the number of stop strings.

The stop string that is completed first wins, and of those completed by the same character the one that begins first; so the
result does not depend on how the text was cut. Knows nothing of tokens or requests.
"""

from collections import deque
from collections.abc import Sequence


class StopMatcher:
    """Looks for stop strings in one request's text. Written only by the output processor that made it."""

    def __init__(self, stops: Sequence[str], include_in_output: bool = False) -> None:
        self.matched: str | None = None
        self._include = include_in_output
        self._state = 0
        self._children: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._path = [""]  # a stop string that runs through the node: the node's text is its first `depth` characters
        self._ends: list[str | None] = [None]  # the longest stop string that ends here
        self._fail = [0]
        for stop in stops:
            self._insert(stop)
        self._link()

    def _insert(self, stop: str) -> None:
        node = 0
        for char in stop:
            child = self._children[node].get(char)
            if child is None:
                child = len(self._depth)
                self._children[node][char] = child
                self._children.append({})
                self._depth.append(self._depth[node] + 1)
                self._path.append(stop)
                self._ends.append(None)
                self._fail.append(0)
            node = child
        self._ends[node] = stop

    def _link(self) -> None:
        """Set each node's link, nodes nearer to the root first."""
        queue = deque(self._children[0].values())
        while queue:
            node = queue.popleft()
            self._ends[node] = self._ends[node] or self._ends[self._fail[node]]
            for char, child in self._children[node].items():
                self._fail[child] = self._next(self._fail[node], char)
                queue.append(child)

    def _next(self, state: int, char: str) -> int:
        while state and char not in self._children[state]:
            state = self._fail[state]
        return self._children[state].get(char, 0)

    def feed(self, text: str, *, armed: bool = True) -> str:
        """Take new text; give the text that is certain to stay. After a match (``matched``) nothing more must be fed.

        ``armed=False`` takes the text in without letting a match end in it (``min_tokens``); one may begin in it.
        """
        before = self._state
        state = before
        for i, char in enumerate(text, 1):
            state = self._next(state, char)
            stop = self._ends[state]
            if stop is not None and armed:
                self.matched = stop
                end = self._depth[before] + i
                return self._head(before, text, end if self._include else end - len(stop))
            while state and not self._children[state]:  # a complete stop string that was let pass: no need to hold all of it
                state = self._fail[state]
        self._state = state
        return self._head(before, text, self._depth[before] + len(text) - self._depth[state])

    def _head(self, before: int, text: str, length: int) -> str:
        """The first characters of what was held in state ``before`` and ``text`` together."""
        held = self._depth[before]
        if length <= held:
            return self._path[before][:length]
        return self._path[before][:held] + text[: length - held]

    def flush(self) -> str:
        """The text still held back, at the end of the stream."""
        state, self._state = self._state, 0
        return self._path[state][: self._depth[state]]
