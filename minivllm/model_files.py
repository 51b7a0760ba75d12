"""Reading the JSON files of a model folder: one sentence for whatever is wrong with one."""

import json
from pathlib import Path
from typing import Any

from minivllm.errors import BrokenModelFolder


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ``BrokenModelFolder`` if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BrokenModelFolder(f"{path.parent} has no {path.name}; give a folder in Hugging Face layout.") from None
    except (OSError, ValueError) as error:
        raise BrokenModelFolder(f"{path} cannot be read as JSON ({error}); fetch the model again.") from None
    if not isinstance(found, dict):
        raise BrokenModelFolder(f"{path} is not a JSON object; fetch the model again.")
    return found
