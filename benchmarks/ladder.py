"""Bring docs/learn/ladder.md up to its figures: ``python -m benchmarks.ladder``.

Each ``docs/learn/ladder-NAME.json`` was written by ``mini-vllm learn`` on some machine. From it this makes ladder-NAME.png, and
the text between ``<!-- ladder NAME -->`` and ``<!-- /ladder -->`` of the page.
"""

import re
import sys
from pathlib import Path

from minivllm.learn.picture import draw
from minivllm.learn.report import markdown
from minivllm.learn.result import read

PAGE = Path("docs/learn/ladder.md")
REGION = re.compile(r"(<!-- ladder ([\w.-]+) -->\n).*?(<!-- /ladder -->)", re.DOTALL)


def filled(page: str, folder: Path) -> str:
    """The page with every region as its figures say."""
    return REGION.sub(lambda m: f"{m[1]}{markdown(read(folder / f'ladder-{m[2]}.json'))}\n{m[3]}", page)


def main() -> int:
    """Draw the pictures and fill the page."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), PAGE.parent), encoding="utf-8")
    for path in sorted(PAGE.parent.glob("ladder-*.json")):
        draw(read(path), path.with_suffix(".png"))
        sys.stdout.write(f"{path.with_suffix('.png')}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
