"""The block pool, the keys and the allocator, each alone."""

import pytest

from minivllm.kv.allocator import Allocator
from minivllm.kv.block_pool import BlockPool
from minivllm.kv.prefix import PrefixKeys


def test_blocks_go_round_and_block_zero_is_never_given() -> None:
    pool = BlockPool(5)
    first = pool.take(4)
    assert sorted(first) == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="available"):
        pool.take(1)
    pool.release(first)
    pool.check({})
    assert (pool.num_free, pool.num_cached, pool.num_referenced) == (4, 0, 0)


def test_a_published_block_stays_findable_until_the_least_recently_released_is_evicted() -> None:
    pool = BlockPool(4)
    a, b, c = pool.take(3)
    for block, key in ((a, b"a"), (b, b"b"), (c, b"c")):
        assert pool.publish(block, key)
    pool.release([b])
    pool.release([a])
    pool.release([c])
    assert pool.num_cached == 3
    assert pool.take(1) == [b]  # released first, evicted first
    assert pool.find(b"b") is None
    pool.share([a])
    assert pool.find(b"a") == a
    assert pool.references(a) == 1
    pool.check({a: 1, b: 1})


def test_an_equal_block_is_published_once() -> None:
    pool = BlockPool(4)
    a, b = pool.take(2)
    assert pool.publish(a, b"same")
    assert not pool.publish(b, b"same")
    pool.release([a, b])
    assert (pool.num_cached, pool.num_free) == (1, 2)


def test_an_unpublished_block_is_free_again() -> None:
    pool = BlockPool(3)
    (a,) = pool.take(1)
    pool.publish(a, b"k")
    pool.release([a])
    pool.unpublish(a)
    assert pool.find(b"k") is None
    pool.check({})
    assert pool.num_free == 2


def test_releasing_what_nobody_holds_is_refused() -> None:
    pool = BlockPool(3)
    with pytest.raises(ValueError, match="nobody holds"):
        pool.release([1])


def test_check_notices_a_lost_block() -> None:
    pool = BlockPool(3)
    pool.take(1)
    with pytest.raises(RuntimeError, match="differ"):
        pool.check({})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (([1, 23], "", ""), ([12, 3], "", "")),  # numbers glued together
        (([1, 2], "ab", "c"), ([1, 2], "a", "bc")),  # salt and adapter glued together
        (([1, 2], "x", ""), ([1, 2], "", "x")),
        (([1, 2], "", ""), ([1, 2], "tenant", "")),
    ],
)
def test_different_prefixes_have_different_keys(one: tuple, other: tuple) -> None:
    keys = [PrefixKeys(2, salt, adapter).extend(ids, 1)[0] for ids, salt, adapter in (one, other)]
    assert keys[0] != keys[1]


def test_a_key_names_the_whole_prefix() -> None:
    a = PrefixKeys(2, "", "").extend([1, 2, 3, 4], 2)
    b = PrefixKeys(2, "", "").extend([9, 2, 3, 4], 2)
    assert a[1] != b[1]
    assert PrefixKeys(2, "", "").extend([1, 2, 3, 4, 5, 6], 2) == a


def allocator(num_blocks: int = 9, **more: object) -> Allocator:
    return Allocator((num_blocks,), 4, **more)  # type: ignore[arg-type]


def test_a_prompt_is_found_again_but_its_last_token_is_always_left_to_compute() -> None:
    kv = allocator()
    prompt = list(range(8))
    kv.open(1)
    first = kv.admit(1, prompt)
    assert first is not None
    assert first.computed == 0
    kv.publish(1, prompt, 8)
    kv.open(2)
    second = kv.admit(2, prompt)
    assert second is not None
    assert second.computed == 4  # not 8: the logits of token 8 are wanted
    assert second.block_ids[0][0] == first.block_ids[0][0]
    kv.check()
    kv.close(1)
    kv.close(2)
    kv.check()
    assert kv.counts().referenced == 0
    assert kv.counts().cached == 2


def test_prefix_caching_can_be_switched_off() -> None:
    kv = allocator(prefix_caching=False)
    kv.open(1)
    kv.admit(1, list(range(8)))
    assert kv.publish(1, list(range(8)), 8) == []
    kv.open(2)
    second = kv.admit(2, list(range(8)))
    assert second is not None
    assert second.computed == 0


def test_cached_blocks_that_a_prompt_shares_are_not_counted_twice() -> None:
    kv = allocator(num_blocks=4)  # three blocks
    prompt = list(range(9))
    kv.open(1)
    kv.admit(1, prompt)
    kv.publish(1, prompt, 8)
    kv.release(1)
    kv.open(2)
    assert kv.admit(2, [*prompt, 9, 10, 11, 12]) is None  # needs four
    admitted = kv.admit(2, prompt)
    assert admitted is not None
    assert admitted.computed == 8
    kv.check()


def test_a_fork_shares_full_blocks_and_copies_the_begun_one() -> None:
    kv = allocator()
    tokens = list(range(7))
    kv.open(1)
    parent = kv.admit(1, tokens)
    kv.open(2)
    child = kv.fork(1, 2, tokens, 7)
    assert parent is not None
    assert child is not None
    assert child.computed == 6
    assert child.block_ids[0][0] == parent.block_ids[0][0]
    (copy,) = child.copies
    assert (copy.src, copy.dst) == (parent.block_ids[0][1], child.block_ids[0][1])
    kv.check()


def test_groups_are_given_together_or_not_at_all() -> None:
    kv = Allocator((9, 3), 4)  # the second group has two blocks only
    kv.open(1)
    assert kv.admit(1, list(range(12))) is None
    assert kv.admit(1, list(range(8))) is not None
    assert kv.grow(1, 12) is None
    kv.check()
    assert [len(ids) for ids in (kv.held_blocks(1),)] == [4]
