"""Philox gives the published answers, whatever the shapes; noise is a function of its arguments alone."""

import pytest
import torch

from minivllm.sampling.philox import philox4x32

# Random123's kat_vectors, "philox4x32 10": counter, key, answer.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def plain(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """The paper's rounds on Python integers."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (p1 >> 32) ^ b ^ k0, p1 % 2**32, (p0 >> 32) ^ d ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return a, b, c, d


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]) -> None:
    words = [torch.tensor([w]) for w in counter]
    got = philox4x32((words[0], words[1], words[2], words[3]), (torch.tensor([key[0]]), torch.tensor([key[1]])))
    assert tuple(int(w) for w in got) == answer == plain(counter, key)


def test_shapes_broadcast() -> None:
    generator = torch.Generator().manual_seed(0)
    block = torch.arange(50)
    b, c, d, k0, k1 = torch.randint(0, 2**32, (5, 7, 1), generator=generator)
    got = torch.stack(philox4x32((block, b, c, d), (k0, k1)), dim=-1)
    assert got.shape == (7, 50, 4)
    for row in range(7):
        for i in (0, 1, 49):
            key = (int(k0[row]), int(k1[row]))
            assert tuple(got[row, i].tolist()) == plain((i, int(b[row]), int(c[row]), int(d[row])), key)
