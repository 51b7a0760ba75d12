"""Grammar masks on the device: what a mask rules out is out, nothing else is touched."""

from typing import Any

import pytest
import torch

from minivllm.kernels import reference
from minivllm.types import ANY_TOKEN, BY_BITS

pytest.importorskip("triton")


@pytest.fixture
def rule_out(triton_device: torch.device) -> Any:
    from minivllm.kernels.triton.chip import this_chip
    from minivllm.kernels.triton.masks import Masks

    return Masks(this_chip(triton_device)).rule_out


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 199, 4096, 5000, 151_936])
def test_as_the_reference(rule_out: Any, triton_device: torch.device, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn((6, vocab_size), generator=generator)
    wishes = torch.tensor([[3, 0, 4, 2, 5, 3], [9] * 6], dtype=torch.int32).T.contiguous()  # a row, and something else
    shape = (6, 1 + -(-vocab_size // 32))
    masks = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).to(torch.int32)
    masks[:, 0] = BY_BITS
    masks[0, 1:] = -1  # everything may come
    masks[4, 1:] = 0  # nothing may
    masks[2, 0], masks[5, 0] = ANY_TOKEN, vocab_size // 2  # whatever the bits are
    wanted = logits.clone()
    for place, row in enumerate(wishes[:, 0].tolist()):
        says, *mask = masks[row].tolist()
        for token in range(vocab_size) if vocab_size < 6000 else range(0, vocab_size, 97):
            bit = mask[token // 32] >> (token % 32) & 1
            if not (bit if says == BY_BITS else says in (ANY_TOKEN, token)):
                wanted[place, token] = -torch.inf
    plain, ours = logits.clone(), logits.clone().to(triton_device)
    reference.rule_out(plain, wishes[:, 0], masks)
    rule_out(ours, wishes.to(triton_device)[:, 0], masks.to(triton_device))
    assert torch.equal(ours.cpu(), plain)
    seen = slice(None) if vocab_size < 6000 else slice(0, None, 97)
    assert torch.equal(plain[:, seen], wanted[:, seen])
    assert torch.equal(plain[[1, 3]], logits[[1, 3]]), "rows whose mask allows all stay"
    assert plain[4].isfinite().sum() == 1 and plain[4, vocab_size // 2] == logits[4, vocab_size // 2]


def test_masks_that_do_not_fit(rule_out: Any, triton_device: torch.device) -> None:
    logits = torch.zeros((2, 64), device=triton_device)
    rows = torch.tensor([0, 1], device=triton_device)
    good = torch.zeros((2, 3), dtype=torch.int32)
    for bad in (torch.zeros((2, 2), dtype=torch.int32), torch.zeros((2, 4), dtype=torch.int32), torch.zeros((2, 3))):
        with pytest.raises(ValueError, match="do not fit"):
            rule_out(logits, rows, bad.to(triton_device))
    with pytest.raises(ValueError, match="do not fit"):
        rule_out(logits, rows[:1], good.to(triton_device))
    rule_out(logits[:0], rows[:0], good.to(triton_device))
    assert not logits.any()
