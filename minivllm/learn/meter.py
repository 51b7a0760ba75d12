"""The counter beside the plain model: what each call computed and moved, padding told apart.

The four small programs work on rectangles: every row of a call is as wide as the widest. So whatever a shorter row lacks is
computed, read and copied all the same, and this file counts it.
"""

from collections.abc import Sequence

from minivllm.learn.arithmetic import Cost, Sizes


class Meter:
    """Costs of the calls so far. Written by the ``Model``, and by a program that copies a cache itself."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.costs: list[Cost] = []

    def call(self, real: Sequence[tuple[int, int]], past: int, width: int, *, kept: bool) -> None:
        """One call: ``real`` says of each row how many of its ``past`` old columns and of its ``width`` new ones hold a token.
        Where K and V are ``kept``, joining old and new columns copies the old ones."""
        s, num_rows, columns = self.sizes, len(real), past + width
        tokens = num_rows * width
        useful = [(old, new) for old, new in real if new]  # a row without a new token is carried along for nothing
        padding = tokens - sum(new for _, new in useful)
        lost_old = num_rows * past - sum(old for old, _ in useful)
        copied, lost_copied = (2 * num_rows * past, 2 * lost_old) if past else (0, 0)  # read, and written elsewhere
        moved = copied + tokens + num_rows * columns  # joined; new ones written; all read by attention
        lost = lost_copied + padding + lost_old + padding
        pairs = tokens * columns * len(s.windows)  # a plain product computes what the mask then hides
        self.costs.append(
            Cost(
                calls=1,
                tokens=tokens,
                padding=padding,
                flops=2 * (s.layer_params * tokens + s.head_params * num_rows) + s.pair_flops * pairs,
                weight_bytes=s.weight_bytes,
                kv_bytes=moved * s.kv_bytes if kept else 0,
                kv_padding_bytes=lost * s.kv_bytes if kept else 0,
            )
        )

    def stacked(self, lengths: Sequence[int]) -> None:
        """Caches of these lengths were read, and written into one as wide as the longest."""
        written, real = max(lengths) * len(lengths), sum(lengths)
        s = self.sizes
        self.costs.append(Cost(kv_bytes=(real + written) * s.kv_bytes, kv_padding_bytes=(written - real) * s.kv_bytes))
