"""Logprobs of chosen and likeliest tokens against float64's."""

import pytest
import torch

from minivllm.kernels import reference
from minivllm.kernels.triton.chip import this_chip
from minivllm.kernels.triton.logprobs import MAX_TOP, Logprobs


def check(logits: torch.Tensor, chosen: torch.Tensor, num_top: int) -> None:
    found = Logprobs(this_chip(logits.device)).of(logits, chosen, num_top)
    plain = reference.logprobs(logits, chosen, num_top)
    assert torch.equal(found.ranks, plain.ranks) and torch.equal(found.top_ids, plain.top_ids)
    exact = logits.double().log_softmax(-1)
    mine = exact.gather(1, chosen[:, None])
    torch.testing.assert_close(found.logprobs.double(), mine[:, 0], rtol=1e-5, atol=1e-5)
    assert torch.equal(found.ranks.long(), 1 + (logits > logits.gather(1, chosen[:, None])).sum(1))
    order = logits.sort(dim=-1, descending=True, stable=True)  # stable: equal logits in the order of their ids
    assert torch.equal(found.top_ids.long(), order.indices[:, :num_top])
    torch.testing.assert_close(found.top_logprobs.double(), exact.gather(1, order.indices[:, :num_top]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_top", [0, 1, 5, MAX_TOP])
@pytest.mark.parametrize("vocab_size", [50, 4096, 9001])
def test_as_log_softmax_and_sort(triton_device: torch.device, vocab_size: int, num_top: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(3, vocab_size, generator=generator) * 6).to(triton_device)
    chosen = torch.tensor([0, vocab_size - 1, int(logits[2].argmax())], device=triton_device)
    check(logits, chosen, num_top)


def test_equal_logits_come_in_the_order_of_their_ids(triton_device: torch.device) -> None:
    logits = torch.zeros(2, 5000, device=triton_device)
    logits[1, 4500:4510] = 3.0
    check(logits, torch.tensor([4999, 4505], device=triton_device), MAX_TOP)


def test_tokens_that_are_ruled_out(triton_device: torch.device) -> None:
    """Fewer tokens than places are possible, whole parts are not; the others of the places are ruled out too, and said so."""
    logits = torch.full((2, 9000), float("-inf"), device=triton_device)
    logits[:, 4100:4103] = torch.tensor([1.0, 3.0, 2.0], device=triton_device)
    logits[1, 8000] = 500.0
    chosen = torch.tensor([4100, 4101], device=triton_device)
    found = Logprobs(this_chip(triton_device)).of(logits, chosen, 5)
    exact = logits.double().log_softmax(-1)
    torch.testing.assert_close(found.logprobs.double(), exact[[0, 1], [4100, 4101]], rtol=1e-5, atol=1e-5)
    assert found.top_ids.tolist() == [[4101, 4102, 4100, 0, 1], [8000, 4101, 4102, 4100, 0]]
    assert found.top_logprobs[0, 3:].tolist() == [float("-inf")] * 2 and found.ranks.tolist() == [3, 2]


def test_rows_of_a_wider_tensor(triton_device: torch.device) -> None:
    wide = torch.full((4, 400), float("nan"), device=triton_device)
    wide[:, :300] = torch.randn(4, 300, generator=torch.Generator().manual_seed(1)).to(triton_device)
    check(wide[:, :300], torch.tensor([1, 2, 3, 299], device=triton_device), 7)


def test_what_cannot_be_had_is_refused(triton_device: torch.device) -> None:
    kernels, chosen = Logprobs(this_chip(triton_device)), torch.zeros(1, dtype=torch.int64, device=triton_device)
    for vocab_size, num_top in ((100, MAX_TOP + 1), (4, 5), (100, -1)):
        with pytest.raises(ValueError, match="likeliest tokens were asked for"):
            kernels.of(torch.zeros(1, vocab_size, device=triton_device), chosen, num_top)
    nothing = kernels.of(torch.zeros(0, 100, device=triton_device), chosen[:0], 3)
    assert nothing.top_ids.shape == (0, 3) and nothing.logprobs.shape == (0,)
