"""Exercise 2: make a rectangle of rows that are not equally long, and undo it.

Write ``rectangle(prompts)``. It gets lists of token ids and returns three lists of rows, all as wide as the longest prompt:
``ids`` padded on the left, ``positions`` of the tokens, each counted from its own text's beginning, and ``mask``, True
where there is a token. What ids and positions say where the mask is False is up to you, as long as they are integers that
are not negative. The model of rungs 0 to 3 computes your rectangle; each row must get the logits that it gets alone.
"""

from types import ModuleType

import pytest
import torch

from minivllm.config import make_config
from minivllm.door import locate
from minivllm.learn.model import Model, load_model
from minivllm.learn.scenes import prompt

LENGTHS = [(5, 5), (3, 9, 6), (1, 12), (7,)]


@pytest.fixture(scope="module")
def model() -> Model:
    config, _ = locate(make_config(device="cpu", dtype="float32"))
    return load_model(config, 64)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_its_shape(solution: ModuleType, lengths: tuple[int, ...]) -> None:
    prompts = [list(prompt(i, n)) for i, n in enumerate(lengths)]
    ids, positions, mask = solution.rectangle(prompts)
    for row, tokens in enumerate(prompts):
        n = len(tokens)
        assert len(ids[row]) == len(positions[row]) == len(mask[row]) == max(lengths)
        assert list(ids[row][-n:]) == tokens
        assert list(positions[row][-n:]) == list(range(n))
        assert list(mask[row]) == [False] * (max(lengths) - n) + [True] * n


@pytest.mark.parametrize("lengths", LENGTHS)
def test_rows_get_the_logits_that_they_get_alone(solution: ModuleType, model: Model, lengths: tuple[int, ...]) -> None:
    prompts = [list(prompt(i, n)) for i, n in enumerate(lengths)]
    ids, positions, mask = (torch.tensor(rows) for rows in solution.rectangle(prompts))
    together, _ = model(ids, positions, mask=mask)
    for row, tokens in enumerate(prompts):
        alone, _ = model(torch.tensor([tokens]), torch.arange(len(tokens))[None])
        torch.testing.assert_close(together[row], alone[0], rtol=1e-3, atol=1e-3)
