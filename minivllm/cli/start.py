"""Getting a model ready, in this process (``load_llm``) or in an engine process of its own (``start_llm``)."""

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from minivllm.cli.models import shown_bytes
from minivllm.cli.options import flat_options
from minivllm.config import Config
from minivllm.types import EngineInfo

if TYPE_CHECKING:
    from minivllm.async_llm import AsyncLLM
    from minivllm.llm import LLM
    from minivllm.text.tokenizer import Tokenizer


def load_llm(config: Config) -> "LLM":
    """Load a model into this process. The folder is checked before torch is imported: a typing error costs no seconds.

    Raises ``StartupError``.
    """
    from minivllm.door import locate

    config, _ = locate(config)
    from minivllm.llm import LLM

    return LLM(**flat_options(config))


def _nothing() -> None:
    """No further work."""


async def start_llm(config: Config, folder: Path, meanwhile: Callable[[], None] = _nothing) -> "AsyncLLM":
    """Start the engine process for ``config``, whose model lies in ``folder``. Raises ``StartupError``.

    The child loads torch and the weights while this process loads the tokenizer and does what the caller wants done
    ``meanwhile``. Whoever calls must run ``run()`` of what it gets as a task, and ``close()`` it.
    """
    from minivllm.engine.supervisor import start_engine
    from minivllm.observe.recording import Recorder

    recorder = None if config.observe.record_steps is None else Recorder(config.observe.record_steps)
    starting = asyncio.create_task(start_engine(config))
    await asyncio.sleep(0)  # let the child start before this process is busy importing
    try:
        tokenizer = _load_tokenizer(config, folder)
        meanwhile()
        client = await starting
    except BaseException:
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await starting  # ends the child
        raise
    from minivllm.async_llm import AsyncLLM
    from minivllm.observe.metrics import metrics_for

    if recorder is not None:
        recorder.begin(client.info, config.served_names[0])
    return AsyncLLM(client, tokenizer, config, metrics_for(config, client.info), recorder=recorder)


def _load_tokenizer(config: Config, folder: Path) -> "Tokenizer":
    """Load the tokenizer, and the modules that are needed in a moment."""
    import minivllm.async_llm
    import minivllm.observe.metrics  # noqa: F401
    from minivllm.door import tokenizer_folder
    from minivllm.text.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer_folder(config, folder), config.model.chat_template)


def memory_table(info: EngineInfo) -> str:
    """What the engine's memory is used for, and how much text it holds."""
    num_tokens = info.num_blocks * info.block_size
    rows = [
        ("weights", shown_bytes(info.weights_bytes), info.dtype),
        ("KV cache", shown_bytes(info.kv_bytes), f"{info.num_blocks:,} blocks of {info.block_size} tokens"),
        ("workspace", shown_bytes(info.workspace_bytes), f"steps of up to {info.max_num_batched_tokens:,} tokens"),
        ("spare", shown_bytes(info.spare_bytes), "in the process that engines are forked from"),
        ("total", shown_bytes(info.weights_bytes + info.kv_bytes + info.workspace_bytes), f"on {info.device}"),
    ]
    lines = [f"{name:<10} {size:>10}  {note}" for name, size, note in rows]
    name = "KV" if info.device == "cpu" else "GPU KV"
    lines.append(f"{name} cache size: {num_tokens:,} tokens")
    length = info.max_model_len
    lines.append(f"Maximum concurrency for {length:,} tokens per request: {num_tokens / length:.2f}x")
    return "\n".join([*lines, *(f"note: {note}" for note in info.notes)])
