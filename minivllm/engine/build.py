"""From options to a running engine, in this process."""

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from minivllm.config import Config
from minivllm.engine.engine import Engine
from minivllm.engine.grammars import Grammars, GrammarSizes
from minivllm.errors import InvalidOption
from minivllm.kv.allocator import Allocator
from minivllm.models.hub import fetch_model
from minivllm.parallel.executor import LocalExecutor
from minivllm.runner.build import Prepared, build_runner, prepare
from minivllm.runner.choose import num_cores
from minivllm.runner.loader import map_weights
from minivllm.runner.runner import MakeSampler
from minivllm.scheduler.book import Limits
from minivllm.scheduler.scheduler import Scheduler
from minivllm.text.helper import Words
from minivllm.text.tokenizer import load_tokenizer
from minivllm.types import EngineInfo

log = logging.getLogger("minivllm")
MOST_MASK_THREADS = 8  # beyond these, a step's masks take no less time
MOST_GUIDE_WORKERS, LEAST_GUIDE_WORKERS = 8, 2
CORES_OF_LOOPS = 3  # the engine's, the server's and one for whatever else runs


def prepare_engine(config: Config) -> Callable[[Config], Engine]:
    """Do what engines can share, in the process that they are forked from; what builds one of them then. Raises
    ``StartupError``."""
    if not _may_be_a_gpu(config):
        return partial(build_engine, prepared=prepare(config))
    import minivllm.runner.build_device
    import minivllm.runner.dry_run  # noqa: F401

    dummy = config.model.load_format == "dummy"
    folder = fetch_model(config.model.model, config.model.revision, config.model.download_dir, weights=not dummy)
    mapped = () if dummy else map_weights(folder)

    def build(config: Config) -> Engine:
        """Read the weights from where they are mapped."""
        log.debug("%d files of weights are in memory", len(mapped))
        return build_engine(config)

    return build


def _may_be_a_gpu(config: Config) -> bool:
    """Whether the model may run on one. Torch is not asked: its answer would start a thread of the driver's."""
    return config.runner.device != "cpu" and torch.version.cuda is not None and Path("/dev/nvidiactl").exists()


def build_engine(config: Config, make_sampler: MakeSampler | None = None, prepared: Prepared | None = None) -> Engine:
    """Load the model, size the cache and join scheduler and runner. ``make_sampler`` replaces the sampler (tests look at the
    logits so); ``prepared`` is what was done for it in another process. Raises ``StartupError``."""
    if config.scheduler.max_num_batched_tokens < config.scheduler.max_num_seqs:
        raise InvalidOption(
            f"--max-num-batched-tokens ({config.scheduler.max_num_batched_tokens}) must be at least --max-num-seqs "
            f"({config.scheduler.max_num_seqs}), so that every running sequence can get a token in a step; raise the one or "
            "lower the other."
        )
    runner, info = build_runner(config, make_sampler, prepared)
    sizes = GrammarSizes(info.vocab_size, info.max_num_seqs, mask_threads(config), guide_workers(config, info))
    grammars = Grammars(partial(_words, config, info), sizes)
    scheduler, overlap = make_scheduler(config, info), overlap_of(config, info)
    return Engine(scheduler, LocalExecutor(runner), info, time.monotonic, overlap, grammars)


def _words(config: Config, info: EngineInfo) -> Words:
    """The model's vocabulary for grammars. Raises ``StartupError`` subclasses when its tokenizer cannot be read."""
    tokenizer = load_tokenizer(Path(config.model.tokenizer or config.model.model))
    size = max(info.vocab_size, tokenizer.vocab_size)
    return Words(tokenizer.as_json(), size, tokenizer.known_ids(info.eos_token_ids))


def mask_threads(config: Config) -> int:
    """Threads that compute grammar masks; while they do, those of a model on the CPU wait."""
    return min(MOST_MASK_THREADS, config.runner.num_threads or num_cores())


def guide_workers(config: Config, info: EngineInfo) -> int:
    """Processes that follow grammars. Beside a model on the CPU they would take its cores; few gain nothing."""
    if config.runner.num_grammar_workers is not None:
        return config.runner.num_grammar_workers
    spare = num_cores() - CORES_OF_LOOPS
    return min(MOST_GUIDE_WORKERS, spare) if info.device != "cpu" and spare >= LEAST_GUIDE_WORKERS else 0


def make_scheduler(config: Config, info: EngineInfo) -> Scheduler:
    """The scheduler that fits what the runner settled on."""
    limits = Limits(
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        max_model_len=info.max_model_len,
        eos_token_ids=info.eos_token_ids,
        batching_policy=config.scheduler.batching_policy,
        scheduling_policy=config.scheduler.scheduling_policy,
        record_tokens=config.tells_tokens,
    )
    return Scheduler(limits, Allocator((info.num_blocks,), info.block_size, config.cache.enable_prefix_caching))


def overlap_of(config: Config, info: EngineInfo) -> int:
    """How many steps are launched before the oldest is collected. On a CPU the step itself occupies the cores, so planning
    ahead gains nothing."""
    wanted = config.scheduler.async_scheduling
    return int(info.device != "cpu") if wanted is None else int(wanted)
