"""Real servers on a scripted engine, to be scraped as the configuration in deploy/ says."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_engine import Live, make_tokenizer

from minivllm.config import make_config


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Live]]:
    """Start servers with these options; all are stopped at the end."""
    tokenizer = make_tokenizer(tmp_path)
    started: list[Live] = []

    def start_one(**options: Any) -> Live:
        config = make_config(port=0, served_model_name=("fox",), **options)
        started.append(Live(tokenizer, config).start())
        return started[-1]

    yield start_one
    for live in started:
        live.end()
