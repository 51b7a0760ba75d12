"""The draw on a GPU: the CPU's tokens, from noise that is bit for bit the same."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from minivllm.kernels import reference
from minivllm.kernels.triton.chip import this_chip
from minivllm.kernels.triton.cutoff import Cutoff
from minivllm.kernels.triton.sampling import Draw, gumbel, philox4x32, scaled
from minivllm.sampling.batch import SampleBatch
from minivllm.sampling.gumbel import GumbelDraw
from minivllm.sampling.min_p import MinP
from minivllm.sampling.philox import PURPOSE_SAMPLE
from minivllm.sampling.philox import philox4x32 as host_philox
from minivllm.sampling.temperature import Temperature
from minivllm.sampling.top_k import TopK
from minivllm.sampling.top_p import TopP
from minivllm.types import NewRow, SamplingParams

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities on their way to a comparison

VOCAB = 1024 + 67  # a block, and what is left over of the next
NEAR = 1e-5  # scores of the float64 draw this close may come out in either order


@pytest.fixture
def draw(triton_device: torch.device) -> Draw:
    return Draw(this_chip(triton_device), PURPOSE_SAMPLE)


def random_logits(num_rows: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    return torch.randn((num_rows, vocab), generator=torch.Generator().manual_seed(seed)).mul_(3)


class Rows:
    """Sequences in rows 0.. with their parameters, as the CPU's features and as wishes."""

    def __init__(self, sampling: list[SamplingParams], vocab: int = VOCAB) -> None:
        self.sampling = sampling
        num_rows = len(sampling)
        self.features = (Temperature(num_rows), MinP(num_rows), TopK(num_rows, vocab), TopP(num_rows))
        self.gumbel = GumbelDraw(num_rows)
        self.seeds = [(0x9E3779B97F4A7C15 * (row + 1)) % 2**63 for row in range(num_rows)]
        rows = np.arange(num_rows)
        self.batch = SampleBatch(rows, 7 + 3 * rows, torch.zeros((num_rows, 1), dtype=torch.int32))
        for row, (params, seed) in enumerate(zip(sampling, self.seeds, strict=True)):
            new = NewRow(
                uid=row, row=row, token_ids=(1,), num_prompt=1, sampling=params, seed=seed, sample_index=row % 3, lora_slot=0,
                block_ids=((1,),), computed=0,
            )  # fmt: skip
            for state in (*self.features, self.gumbel):
                state.set_row(new)

    def values(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.tensor([getattr(params, name) for params in self.sampling], dtype=dtype, device=device)

    def wishes(self, device: torch.device) -> Tensor:
        rows = np.zeros((len(self.sampling), 6), dtype=np.uint32)
        for row, (params, seed) in enumerate(zip(self.sampling, self.seeds, strict=True)):
            bits = np.float32(params.temperature).view(np.uint32)
            rows[row] = (row, self.batch.positions[row], bits, seed & 0xFFFFFFFF, seed >> 32, row % 3)
        return torch.from_numpy(rows.view(np.int32)).to(device)

    def scaled(self, logits: Tensor) -> Tensor:
        """Logits after the temperature."""
        logits = logits.clone()
        self.features[0].apply(logits, self.batch)
        return logits

    def filtered(self, logits: Tensor) -> Tensor:
        """Logits after the temperature and the filters, on the CPU."""
        logits = self.scaled(logits)
        for feature in self.features[1:]:
            if feature.active(self.batch):
                feature.apply(logits, self.batch)
        return logits

    def scores(self, logits: Tensor) -> Tensor:
        """The float64 scores of the draw."""
        vocab = logits.shape[1]
        blocks = torch.arange((vocab + 3) // 4)
        words = torch.tensor(
            [(p, r % 3, PURPOSE_SAMPLE, s & 0xFFFFFFFF, s >> 32)
             for r, (p, s) in enumerate(zip(self.batch.positions.tolist(), self.seeds, strict=True))]
        )  # fmt: skip
        position, index, purpose, key0, key1 = words.T[:, :, None]
        noise = torch.stack(host_philox((blocks, position, index, purpose), (key0, key1)), dim=-1).flatten(1)[:, :vocab]
        return logits.double() - ((noise.double() + 0.5) * 2.0**-32).log().neg().log()


def check_drawn(rows: Rows, logits: Tensor, found: Tensor) -> None:
    """``found`` are the CPU's draws from scaled ``logits``, but where two scores are too close to tell."""
    expected = rows.gumbel.draw(logits, rows.batch, filtered=False)
    scores = rows.scores(logits)
    for row in (found.cpu() != expected).nonzero()[:, 0].tolist():
        assert scores[row].max() - scores[row, found[row]] < NEAR, f"row {row}: {found[row]} instead of {expected[row]}"


@triton.jit
def _philox_words(out, a, b, c, d, key0, key1, N: tl.constexpr):
    counter = a.to(tl.uint32) + tl.zeros((N,), tl.uint32)
    words = philox4x32(counter, b.to(tl.uint32), c.to(tl.uint32), d.to(tl.uint32), key0.to(tl.uint32), key1.to(tl.uint32))
    for i in tl.static_range(4):
        tl.store(out + i * N + tl.arange(0, N), words[i].to(tl.int64))


@triton.jit
def _gumbels(words, out, N: tl.constexpr, COMPILED: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, gumbel(tl.load(words + at).to(tl.uint32), COMPILED))


@triton.jit
def _scaled_rows(logits, temperatures, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    temperature = tl.load(temperatures + row)
    logit = tl.load(logits + row * WIDTH + columns, mask=columns < WIDTH, other=0.0)
    value = scaled(logit, temperature, tl.div_rn(1.0, temperature))
    tl.store(out + row * WIDTH + columns, value, mask=columns < WIDTH)


def divided(logits: Tensor, temperatures: Tensor) -> Tensor:
    """``logits / temperatures`` as the kernels see them."""
    out = torch.empty_like(logits)
    _scaled_rows[(len(logits),)](logits, temperatures, out, logits.shape[1], triton.next_power_of_2(logits.shape[1]))
    return out


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)  # fmt: skip
def test_philox_known_answers(
    triton_device: torch.device, counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]
) -> None:
    """The vectors published with Philox (Random123, kat_vectors)."""
    out = torch.zeros((4, 2), dtype=torch.int64, device=triton_device)
    _philox_words[(1,)](out, *counter, *key, 2)
    assert out.cpu().tolist() == [[word, word] for word in words]


def test_noise_is_accurate_at_both_ends(triton_device: torch.device) -> None:
    top = 2**32
    edges = torch.tensor([0, 1, 2, top - 1, top - 2, top // 2, top // 2 - 1, top // 8 * 7, top // 8 * 7 - 1, 2**24 + 1])
    near_one = top - 1 - 2 ** torch.arange(31)
    anywhere = torch.randint(top, (1024 - len(edges) - 31,), generator=torch.Generator().manual_seed(0))
    words = torch.cat((edges, near_one, anywhere))
    out = torch.zeros(1024, dtype=torch.float32, device=triton_device)
    _gumbels[(1,)](words.to(triton_device), out, 1024, triton_device.type == "cuda")
    u = (words.double() + 0.5) * 2.0**-32
    rest = ((top - 1 - words).double() + 0.5) * 2.0**-32
    expected = -(-torch.log1p(-rest).where(u > 0.5, u.log())).log()
    torch.testing.assert_close(out.cpu().double(), expected, rtol=3e-7, atol=2e-6)


def test_scaling_divides(triton_device: torch.device) -> None:
    temperatures = torch.tensor([1.0, 0.7, 0.01, 2.0, 1.3])
    logits = random_logits(5)
    found = divided(logits.to(triton_device), temperatures.to(triton_device)).cpu()
    # The interpreter rounds twice where a chip's fused multiply-add rounds once.
    bound = 2.0**-22 if triton_device.type == "cpu" else 0.0
    torch.testing.assert_close(found, logits / temperatures[:, None], rtol=bound, atol=0.0)


@pytest.mark.parametrize("vocab", (VOCAB, 1024, 50, 3))
def test_draws_are_the_cpus(draw: Draw, triton_device: torch.device, vocab: int) -> None:
    rows = Rows([SamplingParams(temperature=t) for t in (1.0, 0.7, 0.25, 2.0, 0.01, 1.0)], vocab)
    logits = random_logits(6, vocab)
    found, finite = draw.draw(logits.to(triton_device), rows.wishes(triton_device))
    assert found.dtype == torch.int64 and bool(finite.all())
    check_drawn(rows, rows.scaled(logits), found)


def test_rows_of_equal_logits_draw_by_noise_alone(draw: Draw, triton_device: torch.device) -> None:
    rows = Rows([SamplingParams()] * 4)
    logits = torch.zeros(4, VOCAB)
    check_drawn(rows, logits, draw.draw(logits.to(triton_device), rows.wishes(triton_device))[0])


def test_greedy_rows_beside_drawing_ones(draw: Draw, triton_device: torch.device) -> None:
    rows = Rows([SamplingParams(temperature=t) for t in (0.0, 1.0, 0.0, 0.5)])
    logits = random_logits(4)
    found, _ = draw.draw(logits.to(triton_device), rows.wishes(triton_device))
    assert found[[0, 2]].cpu().equal(logits[[0, 2]].argmax(-1))
    cold = logits / torch.tensor([1.0, 1.0, 1.0, 0.5])[:, None]
    found[[0, 2]] = rows.gumbel.draw(cold, rows.batch, filtered=False)[[0, 2]].to(triton_device)
    check_drawn(rows, cold, found)


def test_the_lowest_among_equals(draw: Draw, triton_device: torch.device) -> None:
    logits = torch.zeros(5, VOCAB)
    logits[0, [5, 6, 1030]] = 1.0
    logits[1, [VOCAB - 1, 1024]] = 1.0
    logits[2] = -3.0
    logits[3, 1023] = logits[3, 1027] = 2.0
    logits[4, [7, 6]] = 0.5
    found, finite = draw.choose(logits.to(triton_device))
    assert found.tolist() == [5, 1024, 0, 1023, 6] and bool(finite.all())
    for meant, got in zip(reference.choose(logits), (found, finite), strict=True):
        assert torch.equal(got.cpu(), meant)


@pytest.mark.parametrize("temperature", (0.0, 1.0))
def test_rows_that_are_not_finite(draw: Draw, triton_device: torch.device, temperature: float) -> None:
    logits = random_logits(7)
    logits[1, 3] = logits[2, VOCAB - 1] = float("nan")
    logits[3, 1060] = float("inf")
    logits[4, 1] = float("-inf")
    logits[5] = float("nan")
    logits[6] = float("-inf")
    rows = Rows([SamplingParams(temperature=temperature)] * 7)
    for masked in (False, True):
        found, finite = draw.draw(logits.to(triton_device), rows.wishes(triton_device), masked=masked)
        assert finite.tolist() == [True, False, False, False, masked, False, masked]
        assert bool(((found >= 0) & (found < VOCAB)).all())
    assert draw.choose(logits.to(triton_device))[1].tolist() == [True] + [False] * 6


def test_how_a_row_is_split_changes_nothing(triton_device: torch.device) -> None:
    logits = random_logits(3).mul_(4).round_().to(triton_device)  # many equals
    rows = Rows([SamplingParams(temperature=t) for t in (0.0, 1.0, 0.5)])
    chip = this_chip(triton_device)
    found = [
        Draw(replace(chip, num_sms=num_sms)).draw(logits, rows.wishes(triton_device))[0].tolist()
        for num_sms in (1, chip.num_sms)
    ]
    alone = Draw(chip).draw(logits[1:2], rows.wishes(triton_device)[1:2])[0].tolist()
    assert found[0] == found[1] and alone == found[0][1:2]


FILTERS = (
    {"top_k": 5}, {"top_k": 1}, {"top_k": VOCAB - 1}, {"top_k": VOCAB}, {"top_p": 0.5}, {"top_p": 0.9}, {"top_p": 1e-6},
    {"min_p": 0.1}, {"min_p": 1.0}, {"top_k": 20, "top_p": 0.7}, {"min_p": 0.02, "top_k": 50, "top_p": 0.9}, {},
    {"min_p": 0.3, "top_k": 500},
)  # fmt: skip


@pytest.mark.parametrize("only", (("top_k",), ("top_p",), ("min_p",), ("top_k", "top_p", "min_p")))
@pytest.mark.parametrize("ties", (False, True))
def test_cutoff_keeps_what_the_cpu_keeps(triton_device: torch.device, only: tuple[str, ...], ties: bool) -> None:
    chosen = [wish for wish in FILTERS if set(wish) <= set(only) and (len(only) == 1 or len(wish) != 1)]
    temperatures = [(1.0, 0.7, 2.0)[i % 3] for i in range(len(chosen))]
    rows = Rows([SamplingParams(temperature=t, **wish) for t, wish in zip(temperatures, chosen, strict=True)])
    logits = random_logits(len(chosen))
    if ties:
        logits = logits.mul_(4).round_().div_(4)
    values = {
        name: rows.values(name, torch.int32 if name == "top_k" else torch.float32, triton_device) if name in only else None
        for name in ("top_k", "top_p", "min_p")
    }
    device_temperatures = rows.values("temperature", torch.float32, triton_device)
    lowest = Cutoff(this_chip(triton_device)).lowest_kept(logits.to(triton_device), device_temperatures, **values)
    found = (divided(logits.to(triton_device), device_temperatures) >= lowest[:, None]).cpu()
    # Weights are in float32 here, so a p on the edge between two tokens may fall to either side.
    meant = []
    for share in (1.0, 1 - 2e-6, 1 + 2e-6):
        near = [wish | {"top_p": wish["top_p"] * share} if "top_p" in wish else wish for wish in chosen]
        again = Rows([SamplingParams(temperature=t, **wish) for t, wish in zip(temperatures, near, strict=True)])
        meant.append(again.filtered(logits) > float("-inf"))
    for row, wish in enumerate(chosen):
        counts = [int(kept[row].sum()) for kept in meant]
        assert any(torch.equal(found[row], kept[row]) for kept in meant), f"{wish}: {found[row].sum()} kept, not {counts}"
        assert wish or bool(found[row].all())


def test_cutoff_of_greedy_rows_and_of_nothing_asked(triton_device: torch.device) -> None:
    logits = random_logits(3).to(triton_device)
    temperatures = torch.tensor([0.0, 1.0, 1.0], device=triton_device)
    top_k = torch.tensor([3, 3, 0], dtype=torch.int32, device=triton_device)
    cutoff = Cutoff(this_chip(triton_device))
    lowest = cutoff.lowest_kept(logits, temperatures, top_k, None, None).tolist()
    assert lowest == [float("-inf"), float(logits[1].topk(3).values[-1]), float("-inf")]
    assert cutoff.lowest_kept(logits, temperatures, None, None, None).tolist() == [float("-inf")] * 3


def test_filtered_draws(draw: Draw, triton_device: torch.device) -> None:
    rows = Rows([SamplingParams(temperature=0.8, top_k=40, top_p=0.9) for _ in range(3)])
    logits = random_logits(3)
    logits[2, :1000] = float("-inf")
    device_logits = logits.to(triton_device)
    temperatures = rows.values("temperature", torch.float32, triton_device)
    lowest = Cutoff(this_chip(triton_device)).lowest_kept(
        device_logits, temperatures,
        rows.values("top_k", torch.int32, triton_device), rows.values("top_p", torch.float32, triton_device), None,
    )  # fmt: skip
    found, finite = draw.draw(device_logits, rows.wishes(triton_device), lowest, masked=True)
    left = rows.scaled(logits)
    left.masked_fill_(divided(device_logits, temperatures).cpu() < lowest.cpu()[:, None], -torch.inf)
    check_drawn(rows, left, found)
    assert bool(finite.all()) and found[2] >= 1000
