"""An engine without a model, for tests of everything around it."""

import time

from token_runner import TokenRunner

from minivllm.engine.engine import Engine
from minivllm.kv.allocator import Allocator
from minivllm.scheduler.book import Limits
from minivllm.scheduler.scheduler import Scheduler
from minivllm.types import EngineInfo


def fake_engine(
    vocab_size: int, *, num_blocks: int = 257, max_num_seqs: int = 16, overlap: int = 0, eos_token_ids: tuple[int, ...] = ()
) -> Engine:
    """An engine whose tokens are a function of prompt and seed (``token_runner.expected_tokens``)."""
    limits = Limits(max_num_seqs, 256, 512, eos_token_ids)
    info = EngineInfo(512, max_num_seqs, 256, 16, num_blocks, vocab_size, eos_token_ids, "test", "none", 0, 0, 0)
    scheduler = Scheduler(limits, Allocator((num_blocks,), 16))
    return Engine(scheduler, TokenRunner(16, num_blocks, max_num_seqs, vocab_size), info, time.monotonic, overlap)
