"""The features that change logits before anything is chosen from them, in their order."""

from collections.abc import Sequence

from minivllm.sampling.allowed import AllowedTokens
from minivllm.sampling.bad_words import BadWords
from minivllm.sampling.batch import Feature
from minivllm.sampling.bias import LogitBias
from minivllm.sampling.min_tokens import MinTokens
from minivllm.sampling.penalties import Penalties


def shaping(max_num_seqs: int, vocab_size: int, eos_token_ids: Sequence[int]) -> tuple[Feature, ...]:
    """A new one of each."""
    return (
        AllowedTokens(max_num_seqs),
        BadWords(max_num_seqs),
        MinTokens(max_num_seqs, vocab_size, eos_token_ids),
        LogitBias(max_num_seqs),
        Penalties(max_num_seqs),
    )
