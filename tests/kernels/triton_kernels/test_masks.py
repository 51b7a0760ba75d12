"""Grammar masks on the device: what a mask rules out is out, nothing else is touched."""

from typing import Any

import pytest
import torch

from minivllm.kernels import reference

pytest.importorskip("triton")


@pytest.fixture
def rule_out(triton_device: torch.device) -> Any:
    from minivllm.kernels.triton.chip import this_chip
    from minivllm.kernels.triton.masks import Masks

    return Masks(this_chip(triton_device)).rule_out


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 199, 4096, 5000, 151_936])
def test_as_the_reference(rule_out: Any, triton_device: torch.device, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn((5, vocab_size), generator=generator)
    places, words = torch.tensor([3, 0, 4]), -(-vocab_size // 32)
    masks = torch.randint(-(2**31), 2**31, (3, words), generator=generator, dtype=torch.int64).to(torch.int32)
    masks[1] = -1  # everything may come
    masks[2] = 0  # nothing may
    wanted = logits.clone()
    for place, mask in zip(places.tolist(), masks.tolist(), strict=True):
        for token in range(vocab_size) if vocab_size < 6000 else range(0, vocab_size, 97):
            if not mask[token // 32] >> (token % 32) & 1:
                wanted[place, token] = -torch.inf
    plain, ours = logits.clone(), logits.clone().to(triton_device)
    reference.rule_out(plain, places, masks)
    rule_out(ours, places.to(triton_device), masks.to(triton_device))
    assert torch.equal(ours.cpu(), plain)
    seen = slice(None) if vocab_size < 6000 else slice(0, None, 97)
    assert torch.equal(plain[:, seen], wanted[:, seen])
    assert torch.equal(plain[[1, 2, 0]], logits[[1, 2, 0]]), "rows without a mask, or with one that allows all, stay"


def test_masks_that_do_not_fit(rule_out: Any, triton_device: torch.device) -> None:
    logits = torch.zeros((2, 64), device=triton_device)
    places = torch.tensor([0], device=triton_device)
    for masks in (torch.zeros((1, 3), dtype=torch.int32), torch.zeros((2, 2), dtype=torch.int32), torch.zeros((1, 2))):
        with pytest.raises(ValueError, match="do not fit"):
            rule_out(logits, places, masks.to(triton_device))
    rule_out(logits, places[:0], torch.zeros((0, 2), dtype=torch.int32, device=triton_device))
    assert not logits.any()
