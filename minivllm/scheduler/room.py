"""How large steps may be: what the options say, and less for a while after the device ran out of memory.

Memory is sized at start, so running out is rare: another program took its share, or a library wanted more than was seen. A step
that could not be computed is then tried again smaller: first with fewer tokens (smaller chunks of prompts), and when a step is
all decodes, with fewer requests at a time. What was generated is kept, so nobody notices but by the clock. After a while
without trouble steps grow again.
"""

LEAST_TOKENS = 16  # smaller chunks would not take noticeably less memory
GOOD_STEPS = 512  # after which steps are allowed twice as much again


class StepRoom:
    """Tokens and rows that a step may have. Written by ``Scheduler``."""

    def __init__(self, max_tokens: int, max_rows: int) -> None:
        self._most = (max_tokens, max_rows)
        self.tokens, self.rows = self._most
        self._good_steps = 0

    @property
    def reduced(self) -> bool:
        """True while less is allowed than the options say."""
        return (self.tokens, self.rows) != self._most

    def shrink(self) -> bool:
        """Allow half as much. False: it is as little as it can be."""
        self._good_steps = 0
        least = max(self.rows, LEAST_TOKENS)
        if self.tokens > least:
            self.tokens = max(self.tokens // 2, least)
        elif self.rows > 1:
            self.rows //= 2
        else:
            return False
        return True

    def restore(self) -> None:
        """Who asked for more memory than there is has ended: allow again what the options say."""
        self.tokens, self.rows = self._most

    def step_was_good(self) -> None:
        """A step was computed; after many in a row, allow more."""
        if not self.reduced:
            return
        self._good_steps += 1
        if self._good_steps == GOOD_STEPS:
            self._good_steps = 0
            self.tokens, self.rows = min(2 * self.tokens, self._most[0]), min(2 * self.rows, self._most[1])
