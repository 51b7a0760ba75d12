"""``mini-vllm models``: what can be served without a download, and ``models fetch NAME`` to download more."""

import sys
from collections.abc import Sequence
from pathlib import Path

from minivllm.cli.options import Parser
from minivllm.config import BUNDLED_MODEL
from minivllm.errors import InvalidOption
from minivllm.models.hub import fetch_model


def run(argv: Sequence[str]) -> int:
    """List models, or fetch one."""
    parser = Parser("models", "List the models on this machine, or fetch one.", "[list | fetch NAME] [options]")
    parser.add_argument("action", nargs="?", default="list", help="list (the default) or fetch")
    parser.add_argument("name", nargs="?", metavar="NAME", help="hub name of the model to fetch")
    parser.add_argument("--revision", help="branch, tag or commit")
    parser.add_argument("--download-dir", help="where hub models are kept; none: the hub library's cache")
    found = parser.read(argv)
    if found.action == "fetch" and found.name:
        sys.stdout.write(f"{fetch_model(found.name, found.revision, found.download_dir)}\n")
        return 0
    if found.action != "list" or found.name:
        raise InvalidOption("`mini-vllm models` lists models; `mini-vllm models fetch NAME` downloads one.")
    rows = [*bundled(), *cached(found.download_dir)]
    width = max(len(name) for name, _, _ in rows)
    for name, size_bytes, where in rows:
        sys.stdout.write(f"{name:<{width}}  {shown_bytes(size_bytes):>9}  {where}\n")
    return 0


def bundled() -> list[tuple[str, int, str]]:
    """Name, size in bytes and folder of the models that ship with the package."""
    folders = sorted(p.parent for p in BUNDLED_MODEL.parent.glob("*/config.json"))
    return [(f.name, sum(p.stat().st_size for p in f.iterdir() if p.is_file()), f"bundled, {f}") for f in folders]


def cached(cache: str | None) -> list[tuple[str, int, str]]:
    """Name, size in bytes and folder of the hub models in the library's cache; other repositories there are left out."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        found = scan_cache_dir(cache)
    except (CacheNotFound, ValueError):  # no cache yet, or the folder named is a file
        return []
    rows = []
    for repo in sorted(found.repos, key=lambda r: r.repo_id):
        folders = [r.snapshot_path for r in repo.revisions if _is_model(r.snapshot_path)]
        if repo.repo_type == "model" and folders:
            rows.append((repo.repo_id, repo.size_on_disk, str(folders[0])))
    return rows


def _is_model(folder: Path) -> bool:
    """True when a snapshot holds a config and safetensors."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def shown_bytes(size_bytes: int) -> str:
    """A size for human eyes."""
    value, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
