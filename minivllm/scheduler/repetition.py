"""Whether a text has come to say the same thing over and over.

When a text ends in a pattern of p tokens, said k times, each of its last (k - 1) p tokens equals the token p places before. So
for every p the length of that run is all there is to remember, and only runs that the newest token prolongs go on. The token
that stands p places back equals the newest one at few p: these are found by looking for it in the last ``max_pattern_size``
tokens. Nothing but the output's tokens decides, so the runs can be made anew from these at any time.
"""

from collections.abc import Sequence

from minivllm.types import RepetitionDetection


class Repetition:
    """The runs of one text. Written by the ``Scheduler`` with every token it keeps."""

    def __init__(self, asked: RepetitionDetection, token_ids: Sequence[int], num_prompt: int) -> None:
        """``token_ids`` may hold output already."""
        self._least, self._most, self._count = max(asked.min_pattern_size, 1), asked.max_pattern_size, asked.min_count
        self._num_prompt = num_prompt
        self._runs: dict[int, int] = {}  # pattern size -> newest tokens that equal those so far before them
        for last in range(num_prompt, len(token_ids)):
            self._take(token_ids, last)

    def goes_round(self, token_ids: Sequence[int]) -> bool:
        """Take the newest of ``token_ids``, one more than at the call before. True: the output ends in a repetition."""
        return self._take(token_ids, len(token_ids) - 1)

    def _take(self, token_ids: Sequence[int], last: int) -> bool:
        token, at = token_ids[last], max(self._num_prompt, last - self._most)
        runs: dict[int, int] = {}
        while True:
            try:
                at = token_ids.index(token, at, last)
            except ValueError:
                break
            size = last - at
            runs[size] = self._runs.get(size, 0) + 1
            at += 1
        self._runs = runs
        return any(size >= self._least and run >= size * (self._count - 1) for size, run in runs.items())
