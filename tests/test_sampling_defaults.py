"""What a model's generation_config.json means for requests, and what beats it."""

import json
from pathlib import Path
from typing import Any

import pytest

from minivllm.config import make_config
from minivllm.door import sampling_defaults
from minivllm.errors import BrokenModelFolder, InvalidOption

ADVISED = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": True, "eos_token_id": [1, 2], "min_p": None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "generation_config.json").write_text(json.dumps(ADVISED))
    return tmp_path


def defaults(folder: Path, **options: Any) -> dict[str, Any]:
    return sampling_defaults(make_config(**options), folder)


def test_the_models_own_and_what_beats_it(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert defaults(folder) == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert defaults(folder, override_generation_config='{"temperature": 1, "min_p": 0.1}') == {
        "temperature": 1.0, "top_k": 20, "top_p": 0.95, "min_p": 0.1,
    }  # fmt: skip
    assert defaults(folder, generation_config="vllm") == {}
    assert defaults(folder, generation_config="vllm", override_generation_config='{"top_k": 3}') == {"top_k": 3}
    empty = tmp_path_factory.mktemp("model")
    assert defaults(empty) == {}
    assert defaults(empty, generation_config=str(folder)) == defaults(folder)


def test_what_cannot_be_used_is_said_at_start(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    for text in ("{", "[1]", "3"):
        with pytest.raises(InvalidOption, match="must be a JSON object"):
            defaults(folder, override_generation_config=text)
    with pytest.raises(InvalidOption, match="but not max_new_tokens"):
        defaults(folder, override_generation_config='{"max_new_tokens": 5}')
    for text in ('{"temperature": 9}', '{"top_p": "high"}', '{"top_k": 1.5}'):
        with pytest.raises(InvalidOption, match="cannot be used"):
            defaults(folder, override_generation_config=text)
    with pytest.raises(BrokenModelFolder, match="no generation_config"):
        defaults(folder, generation_config=str(tmp_path_factory.mktemp("nothing")))
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(BrokenModelFolder, match="cannot be read"):
        defaults(folder)
