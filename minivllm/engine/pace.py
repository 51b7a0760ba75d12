"""How long the next step may take, so that one that hangs can be told from one that is long.

A step's time grows with its tokens. What a token cost is learned from the steps that were: the dearest of late, forgotten
slowly. Before the first step there is only the model's size: a token reads every weight once, at a speed that any machine of
its kind reaches. The figure is for a watchdog that waits several times as long; it need be right within that.
"""

from typing import Final

CPU_BYTES_PER_S: Final = 2e10  # weights read times tokens, of the slowest machine thought of
GPU_BYTES_PER_S: Final = 1e12
FORGETS: Final = 0.98  # of what the dearest step counts, from step to step


class Pace:
    """Written by the engine's loop."""

    def __init__(self, weights_bytes: int, device: str) -> None:
        self._token_s = weights_bytes / (CPU_BYTES_PER_S if device == "cpu" else GPU_BYTES_PER_S)
        self._step_s = 0.0
        self._learned = False

    def took(self, num_tokens: int, step_s: float) -> None:
        """A step of ``num_tokens`` took ``step_s``."""
        token_s = step_s / max(num_tokens, 1)
        self._token_s = max(token_s, self._token_s * FORGETS) if self._learned else token_s
        self._step_s = max(step_s, self._step_s * FORGETS)
        self._learned = True

    def expected_s(self, num_tokens: int) -> float:
        """How long a step of ``num_tokens`` may be expected to take, rather too long than too short."""
        return max(self._step_s, num_tokens * self._token_s)
