"""The blocks of one KV group: free, held, or kept because somebody may ask for them again.

A block is an integer. Each of the ids 1 .. num_blocks - 1 is in exactly one of three states (block 0 is scratch: padded rows
write there, nobody reads it):

* *free*: nothing worth keeping is in it;
* *referenced*: one or more sequences hold it;
* *cached*: nobody holds it, but it has a key, so an equal prompt beginning will find it. The one that was let go longest ago
  is evicted first, and only when no free block is left.

So free + referenced + cached = total at every moment, which ``check`` proves. The idea of paging the KV cache is that of
PagedAttention (arXiv:2309.06180).
"""

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """States and keys of the blocks of one KV group. Written by ``Allocator`` alone."""

    def __init__(self, num_blocks: int) -> None:
        """``num_blocks`` counts the whole pool, the scratch block 0 included."""
        if num_blocks < 2:
            raise ValueError(f"a pool needs a scratch block and at least one more, got {num_blocks}")
        self.total = num_blocks - 1
        self._free = list(range(num_blocks - 1, 0, -1))  # a stack: low ids first
        self._cached: OrderedDict[int, None] = OrderedDict()  # unreferenced with a key, longest unused first
        self._refs = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._by_key: dict[bytes, int] = {}
        self.freed: list[int] = []  # that came free since ``take_freed``, some of them twice or taken since

    @property
    def num_available(self) -> int:
        """Blocks that ``take`` could give."""
        return len(self._free) + len(self._cached)

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing worth keeping."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and a lookup would find."""
        return len(self._cached)

    @property
    def num_referenced(self) -> int:
        """Blocks that some sequence holds."""
        return self.total - self.num_available

    def references(self, block: int) -> int:
        """How many sequences hold the block."""
        return self._refs[block]

    def take(self, count: int) -> list[int]:
        """Hand out ``count`` blocks, evicting cached ones when no free one is left. Raises ValueError if there are too few."""
        if count > self.num_available:
            raise ValueError(f"asked for {count} blocks, {self.num_available} are available")
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._forget_key(block)
            self._refs[block] = 1
            taken.append(block)
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Hold blocks that were found by their key or that another sequence holds."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._cached[block]
            self._refs[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Let blocks go, in this order: the first is evicted first. Give a sequence's tail before its head."""
        for block in blocks:
            if self._refs[block] == 0:
                raise ValueError(f"block {block} is released but nobody holds it")
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if self._keys[block] is None:
                    self._free.append(block)
                    self.freed.append(block)
                else:
                    self._cached[block] = None

    def find(self, key: bytes) -> int | None:
        """The block that holds the tokens of this key."""
        return self._by_key.get(key)

    def is_cached(self, block: int) -> bool:
        """True when the block is findable and nobody holds it: sharing it uses up one available block."""
        return self._refs[block] == 0

    def publish(self, block: int, key: bytes) -> bool:
        """Make a held block findable. False when an equal block is findable already; then this one stays private."""
        if self._refs[block] == 0:
            raise ValueError(f"block {block} is published but nobody holds it")
        if key in self._by_key or self._keys[block] is not None:
            return False
        self._by_key[key] = block
        self._keys[block] = key
        return True

    def unpublish(self, block: int) -> None:
        """Nobody shall find this block any more: what it was said to hold is not there."""
        if self._keys[block] is None:
            return
        self._forget_key(block)
        if self._refs[block] == 0:
            del self._cached[block]
            self._free.append(block)
            self.freed.append(block)

    def take_freed(self) -> list[int]:
        """Blocks that came free since this was last asked, and are so now."""
        if not self.freed:
            return []
        freed, self.freed = dict.fromkeys(self.freed), []
        return [b for b in freed if self._refs[b] == 0 and self._keys[b] is None]

    def _forget_key(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._by_key[key]
            self._keys[block] = None

    def check(self, references: dict[int, int]) -> None:
        """Raise RuntimeError unless the states are whole and ``references`` (block -> holders) is what the pool counts."""
        free, cached = set(self._free), set(self._cached)
        held = {b for b in range(1, self.total + 1) if self._refs[b] > 0}
        problems = []
        if len(free) != len(self._free):
            problems.append("a block is free twice")
        if free & cached or free & held or cached & held or len(free | cached | held) != self.total or 0 in free | cached:
            problems.append("free + cached + referenced is not the total")
        if {b: self._refs[b] for b in held} != references:
            problems.append("reference counts differ from what sequences hold")
        if any(self._keys[b] is None for b in cached) or any(self._keys[b] is not None for b in free):
            problems.append("a cached block has no key or a free one has")
        if {b: k for b, k in enumerate(self._keys) if k is not None} != {b: k for k, b in self._by_key.items()}:
            problems.append("keys and blocks disagree")
        if problems:
            raise RuntimeError("block pool: " + "; ".join(problems))
