"""What the grammars of calls are drawn from: the vocabulary of the bundled model."""

from pathlib import Path

import pytest
from split_points import Sampler

import minivllm
from minivllm.text.grammar import vocabulary
from minivllm.text.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def sampler() -> Sampler:
    tokenizer = load_tokenizer(Path(minivllm.__file__).parent / "assets" / "stories")
    end = tokenizer.eos_id or 0
    return Sampler(vocabulary(tokenizer, tokenizer.vocab_size, [end]), tokenizer, end)
