"""From options to a running engine, in this process."""

import time

from minivllm.config import Config
from minivllm.engine.engine import Engine
from minivllm.errors import InvalidOption
from minivllm.kv.allocator import Allocator
from minivllm.parallel.executor import LocalExecutor
from minivllm.runner.build import build_runner
from minivllm.runner.runner import MakeSampler
from minivllm.scheduler.book import Limits
from minivllm.scheduler.scheduler import Scheduler
from minivllm.types import EngineInfo


def build_engine(config: Config, make_sampler: MakeSampler | None = None) -> Engine:
    """Load the model, size the cache and join scheduler and runner. ``make_sampler`` replaces the sampler (tests look at the
    logits so). Raises ``StartupError``."""
    if config.scheduler.max_num_batched_tokens < config.scheduler.max_num_seqs:
        raise InvalidOption(
            f"--max-num-batched-tokens ({config.scheduler.max_num_batched_tokens}) must be at least --max-num-seqs "
            f"({config.scheduler.max_num_seqs}), so that every running sequence can get a token in a step; raise the one or "
            "lower the other."
        )
    runner, info = build_runner(config, make_sampler)
    return Engine(make_scheduler(config, info), LocalExecutor(runner), info, time.monotonic, overlap_of(config, info))


def make_scheduler(config: Config, info: EngineInfo) -> Scheduler:
    """The scheduler that fits what the runner settled on."""
    limits = Limits(
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        max_model_len=info.max_model_len,
        eos_token_ids=info.eos_token_ids,
        batching_policy=config.scheduler.batching_policy,
        scheduling_policy=config.scheduler.scheduling_policy,
    )
    return Scheduler(limits, Allocator((info.num_blocks,), info.block_size, config.cache.enable_prefix_caching))


def overlap_of(config: Config, info: EngineInfo) -> int:
    """How many steps are launched before the oldest is collected. On a CPU the step itself occupies the cores, so planning
    ahead gains nothing."""
    wanted = config.scheduler.async_scheduling
    return int(info.device != "cpu") if wanted is None else int(wanted)
