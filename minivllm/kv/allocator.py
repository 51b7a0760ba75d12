"""Which sequence holds which blocks, in every KV group, and what of a prompt is there already.

The scheduler asks in tokens ("room for 70 tokens of this sequence") and gets block ids back; it never sees keys, reference
counts or pools. A *KV group* is a set of layers that share block tables; all groups are asked together: a sequence is
admitted or grows in all of them or in none, and a prefix counts as found only as far as every group has it.

Nothing here knows when a block's K/V is really written. The scheduler publishes a block in the plan that writes it (steps run
in order, so a later reader finds it written) and takes it back when that step fails.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from minivllm.kv.block_pool import BlockPool
from minivllm.kv.prefix import PrefixKeys
from minivllm.types import BlockIds, CopyBlock


@dataclass(frozen=True)
class Admission:
    """Blocks given to a sequence that begins to run."""

    block_ids: BlockIds
    computed: int  # tokens at the front whose K/V is in those blocks already
    copies: tuple[CopyBlock, ...] = ()


@dataclass
class _Holding:
    """What one sequence holds. Written by ``Allocator`` alone."""

    keys: PrefixKeys
    blocks: list[list[int]]  # per group
    num_published: int = 0  # blocks at the front that are findable, or that an equal findable block makes needless


@dataclass(frozen=True)
class PoolCounts:
    """Blocks by state, summed over the groups."""

    total: int
    free: int
    cached: int
    referenced: int


@dataclass
class Allocator:
    """Block tables of all sequences. Written by the ``Scheduler`` alone."""

    num_blocks: tuple[int, ...]  # per group, scratch block included
    block_size: int
    prefix_caching: bool = True
    _pools: list[BlockPool] = field(init=False)
    _held: dict[int, _Holding] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._pools = [BlockPool(n) for n in self.num_blocks]

    # -- questions -------------------------------------------------------------------------------------------------------

    @property
    def capacity_tokens(self) -> int:
        """Tokens of one sequence that fit when it is alone."""
        return min(p.total for p in self._pools) * self.block_size

    @property
    def num_available(self) -> int:
        """Blocks that could be given in every group."""
        return min(p.num_available for p in self._pools)

    def counts(self) -> PoolCounts:
        """Blocks by state; free + cached + referenced = total."""
        pools = self._pools
        return PoolCounts(
            sum(p.total for p in pools),
            sum(p.num_free for p in pools),
            sum(p.num_cached for p in pools),
            sum(p.num_referenced for p in pools),
        )

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks per group that hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def holders(self, blocks: Iterable[tuple[int, int]]) -> set[int]:
        """The sequences that hold any of these (group, block)."""
        wanted = set(blocks)
        return {
            uid for uid, held in self._held.items() if any((g, b) in wanted for g, ids in enumerate(held.blocks) for b in ids)
        }

    # -- life of a sequence ----------------------------------------------------------------------------------------------

    def open(self, uid: int, salt: str = "", adapter: str = "") -> None:
        """Get to know a sequence. It holds nothing until it is admitted; its keys are kept until ``close``."""
        self._held[uid] = _Holding(PrefixKeys(self.block_size, salt, adapter), [[] for _ in self._pools])

    def close(self, uid: int) -> None:
        """Forget a sequence, letting go of what it holds."""
        self.release(uid)
        del self._held[uid]

    def admit(self, uid: int, token_ids: Sequence[int], headroom: int = 0, *, reads_cache: bool = True) -> Admission | None:
        """Give blocks for all of ``token_ids``, sharing what is cached unless all is to be computed, or None when fewer than
        ``headroom`` blocks would be left. At least the last token is left to compute: its logits are wanted."""
        hits = self._find_prefix(uid, token_ids) if reads_cache else [[] for _ in self._pools]
        fresh = self.blocks_for(len(token_ids)) - (len(hits[0]) if hits else 0)
        if not self._room(hits, fresh, headroom):
            return None
        self._give(uid, hits, fresh)
        held = self._held[uid]
        held.num_published = len(hits[0])
        return Admission(tuple(tuple(b) for b in held.blocks), len(hits[0]) * self.block_size)

    def fork(self, parent: int, uid: int, token_ids: Sequence[int], computed: int, headroom: int = 0) -> Admission | None:
        """Like ``admit``, sharing the first ``computed`` tokens of a running parent: full blocks by reference, the begun one
        copied. The caller vouches that both sequences are equal so far."""
        computed = min(computed, len(token_ids) - 1)
        full, rest = divmod(computed, self.block_size)
        source = self._held[parent].blocks
        shared = [ids[:full] for ids in source]
        fresh = self.blocks_for(len(token_ids)) - full
        if not self._room(shared, fresh, headroom):
            return None
        self._give(uid, shared, fresh)
        held = self._held[uid]
        held.num_published = min(full, self._held[parent].num_published)
        copies = tuple(CopyBlock(source[g][full], held.blocks[g][full], g) for g in range(len(self._pools))) if rest else ()
        return Admission(tuple(tuple(b) for b in held.blocks), computed, copies)

    def grow(self, uid: int, num_tokens: int) -> BlockIds | None:
        """Make room for ``num_tokens`` tokens in all: the blocks added per group (() when none was needed), or None when
        there are too few."""
        held = self._held[uid]
        missing = self.blocks_for(num_tokens) - len(held.blocks[0])
        if missing <= 0:
            return ()
        if missing > self.num_available:
            return None
        for pool, ids in zip(self._pools, held.blocks, strict=True):
            ids.extend(pool.take(missing))
        return tuple(tuple(ids[-missing:]) for ids in held.blocks)

    def release(self, uid: int) -> None:
        """Let go of everything, tail first, so that of a cached prefix the far end is evicted before its beginning."""
        held = self._held[uid]
        for pool, ids in zip(self._pools, held.blocks, strict=True):
            pool.release(reversed(ids))
            ids.clear()
        held.num_published = 0

    def publish(self, uid: int, token_ids: Sequence[int], num_tokens: int) -> list[tuple[int, int]]:
        """Make the full blocks among the first ``num_tokens`` tokens findable; returns the (group, block) that now are."""
        held = self._held[uid]
        full = num_tokens // self.block_size
        if not self.prefix_caching or full <= held.num_published:
            return []
        keys = held.keys.extend(token_ids, full)
        published = [
            (g, ids[i])
            for g, (pool, ids) in enumerate(zip(self._pools, held.blocks, strict=True))
            for i in range(held.num_published, full)
            if pool.publish(ids[i], keys[i])
        ]
        held.num_published = full
        return published

    def unpublish(self, blocks: Iterable[tuple[int, int]]) -> None:
        """Take (group, block) out of the prefix cache: what they were said to hold was not written."""
        for group, block in blocks:
            self._pools[group].unpublish(block)

    def held_blocks(self, uid: int) -> list[tuple[int, int]]:
        """Every (group, block) that a sequence holds."""
        return [(g, b) for g, ids in enumerate(self._held[uid].blocks) for b in ids]

    def leading(self, uid: int, num_blocks: int) -> list[tuple[int, int]]:
        """The (group, block) of a sequence's first ``num_blocks`` blocks in each group."""
        return [(g, b) for g, ids in enumerate(self._held[uid].blocks) for b in ids[:num_blocks]]

    def unheld(self, blocks: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Those (group, block) that no sequence holds."""
        return [(g, b) for g, b in blocks if self._pools[g].references(b) == 0]

    def leading_blocks(self, uid: int, num_blocks: int) -> tuple[int, ...]:
        """The first ``num_blocks`` blocks of a sequence in KV group 0, or all that it holds when these are fewer."""
        return tuple(self._held[uid].blocks[0][:num_blocks])

    def take_freed(self) -> tuple[tuple[int, int], ...]:
        """The (group, block) that came free since this was last asked, and are so now."""
        return tuple([(g, b) for g, pool in enumerate(self._pools) for b in pool.take_freed()])

    def freed_again(self, blocks: Iterable[tuple[int, int]]) -> None:
        """Name these (group, block) once more when ``take_freed`` is asked, if they are free then."""
        for group, block in blocks:
            self._pools[group].freed.append(block)

    # -- inside ----------------------------------------------------------------------------------------------------------

    def _find_prefix(self, uid: int, token_ids: Sequence[int]) -> list[list[int]]:
        """Per group, the cached blocks at the front of ``token_ids``; equally many in every group."""
        found: list[list[int]] = [[] for _ in self._pools]
        if not self.prefix_caching:
            return found
        last = (len(token_ids) - 1) // self.block_size
        for key in islice(self._held[uid].keys.extend(token_ids, last), last):
            blocks = [pool.find(key) for pool in self._pools]
            if None in blocks:
                break
            for ids, block in zip(found, blocks, strict=True):
                ids.append(block)  # type: ignore[arg-type]
        return found

    def _room(self, shared: list[list[int]], fresh: int, headroom: int) -> bool:
        """Whether every group can share these blocks and give ``fresh`` more, leaving ``headroom``."""
        return all(
            sum(map(pool.is_cached, ids)) + fresh + headroom <= pool.num_available
            for pool, ids in zip(self._pools, shared, strict=True)
        )

    def _give(self, uid: int, shared: list[list[int]], fresh: int) -> None:
        held = self._held[uid]
        if any(held.blocks):
            raise ValueError(f"sequence {uid} is admitted but holds blocks already")
        for pool, mine, ids in zip(self._pools, held.blocks, shared, strict=True):
            pool.share(ids)
            mine.extend(ids)
            mine.extend(pool.take(fresh))

    def check(self) -> None:
        """Raise RuntimeError unless blocks are conserved in every group."""
        for group, pool in enumerate(self._pools):
            pool.check(Counter(b for held in self._held.values() for b in held.blocks[group]))
