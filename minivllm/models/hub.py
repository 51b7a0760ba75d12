"""From what a user calls a model to a checked local folder.

A model is a folder in Hugging Face layout (config.json, ``*.safetensors``, tokenizer files), or the name of one on the hub.
Only safetensors, JSON and tokenizer files are ever fetched or opened. Pickles (``*.bin``, ``*.pt``) can run code when they are
opened, so a model that has nothing else is refused before anything is downloaded.

The checks read headers, never weights: a truncated download is found in milliseconds, before torch is imported. What the
weights *mean* (architecture, names, shapes) this file does not know.
"""

import contextlib
import difflib
import re
from collections.abc import Iterable
from pathlib import Path

import msgspec

from minivllm.errors import BrokenModelFolder, ModelNotFound, PicklesOnly
from minivllm.model_files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 16 * 2**20  # some 100,000 tensors; the format allows more, which takes gigabytes to read
_HUB_NAME = re.compile(r"[\w.\-]+(/[\w.\-]+)?", re.ASCII)
_PICKLES = re.compile(r"\.(bin|pt|pth|ckpt|pkl|pickle)$")
_TOKENIZER_FILES = re.compile(r"(tokenizer\.model|merges\.txt|vocab\.\w+|\S+\.jinja|\S+\.json)", re.ASCII)
_PICKLES_REMEDY = (
    "pickles can run code when opened and are never read; use a revision that has safetensors, or convert it with "
    "transformers' save_pretrained"
)


def fetch_model(model: str, revision: str | None, download_dir: str | None, *, weights: bool = True) -> Path:
    """Return the checked local folder of ``model``, downloading it first if it is a hub name.

    ``weights=False`` fetches and checks everything but the weights (a tokenizer, dummy weights). Raises ``ModelNotFound``,
    ``BrokenModelFolder`` or ``PicklesOnly``, each with what to do.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        check_folder(folder, weights=weights)
        return folder
    if folder.is_file():
        raise ModelNotFound(f"{model} is a file; give the folder that holds config.json and the weights.")
    if _looks_like_path(model):
        raise ModelNotFound(f"There is no folder {model}{_similar(folder)}; check the path, or give a hub name such as 'gpt2'.")
    folder = _fetch_from_hub(model, revision, download_dir, weights)
    check_folder(folder, weights=weights)
    return folder


def _looks_like_path(model: str) -> bool:
    """True when ``model`` cannot be a hub name (``name`` or ``owner/name``)."""
    return model.startswith((".", "/", "~")) or not _HUB_NAME.fullmatch(model)


def _similar(folder: Path) -> str:
    """Name the sibling that a mistyped path may have meant, or say nothing."""
    try:
        siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(folder.name, siblings, n=1)
    return f" (did you mean {folder.parent / close[0]}?)" if close else ""


# ----------------------------------------------------------------------------------------------------------------------
# A local folder
# ----------------------------------------------------------------------------------------------------------------------


def check_folder(folder: Path, *, weights: bool = True) -> None:
    """Raise when ``folder`` is not a whole model: no config, no or only pickled weights, absent or truncated shards."""
    if not (folder / "config.json").is_file() and weights:
        raise BrokenModelFolder(f"{folder} has no config.json, so it is not a model in Hugging Face layout; check the path.")
    if weights:
        for path in weight_files(folder):
            check_safetensors(path)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that make up the model's weights, without duplicates in other forms.

    Raises ``PicklesOnly`` when the weights are only there as pickles, ``BrokenModelFolder`` when they or a shard are absent.
    """
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    if SINGLE not in names and INDEX in names:
        shards = _shards(folder / INDEX)
        if missing := [s for s in shards if s not in names]:
            raise BrokenModelFolder(
                f"{folder / INDEX} names {len(missing)} weight files that are not there (first: {missing[0]}); "
                "complete the download."
            )
        return [folder / s for s in shards]
    chosen = _choose_weights(names)
    if not chosen:
        _raise_no_weights(str(folder), names)
    return [folder / name for name in chosen]


def _raise_no_weights(model: str, names: Iterable[str]) -> None:
    """Raise the error that fits a model without root-level safetensors."""
    if pickles := sorted(n for n in names if "/" not in n and _PICKLES.search(n)):
        raise PicklesOnly(f"{model} has its weights only as pickle files ({pickles[0]}): {_PICKLES_REMEDY}.")
    raise BrokenModelFolder(f"{model} has no weights (*.safetensors); complete the download or choose another model.")


def _choose_weights(names: Iterable[str]) -> list[str]:
    """The root-level weight files to use where no index decides: one whole file, else numbered shards, else all there are."""
    root = sorted(n for n in names if "/" not in n and n.endswith(".safetensors"))
    if SINGLE in root:
        return [SINGLE]
    return [n for n in root if re.fullmatch(r"model-\d+-of-\d+\.safetensors", n)] or root


def _shards(index: Path) -> list[str]:
    """The file names in a sharded checkpoint's index, each once; raises ``BrokenModelFolder`` if it cannot be used."""
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BrokenModelFolder(f"{index} has no weight_map; download it again.")
    shards = sorted({str(name) for name in weight_map.values()})
    if strange := [s for s in shards if not re.fullmatch(r"[\w.\-]+\.safetensors", s, re.ASCII)]:
        raise BrokenModelFolder(f"{index} names {strange[0]!r}, which is not a safetensors file of this folder.")
    return shards


class _Tensor(msgspec.Struct, gc=False):
    """What a safetensors header says of a tensor."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def check_safetensors(path: Path) -> None:
    """Raise ``BrokenModelFolder`` when a safetensors file is shorter or longer than its own header says, or when its tensors
    do not lie one behind the other.

    The format: 8 bytes little-endian header length, a JSON header with the byte span of each tensor, then the data.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start.startswith(b"version "):
                raise BrokenModelFolder(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder.")
            length = int.from_bytes(start, "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise BrokenModelFolder(f"{path} is truncated or no safetensors file; download it again.")
            end = _end_of_tensors(file.read(length))
    except OSError as error:
        raise BrokenModelFolder(f"{path} cannot be read ({error.strerror}); check its permissions.") from None
    except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
        raise BrokenModelFolder(f"{path} has a header that is not safetensors'; download it again.") from None
    if size != 8 + length + end:
        raise BrokenModelFolder(
            f"{path} is truncated: it holds {size:,} bytes where its header announces {8 + length + end:,}; download it again."
        )


def _end_of_tensors(header: bytes) -> int:
    """Where the data of a safetensors file ends. Raises ``ValueError`` for a header that is none."""
    parts = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
    tensors = [msgspec.json.decode(raw, type=_Tensor) for name, raw in parts.items() if name != "__metadata__"]
    end = 0
    for begin, after in sorted(tensor.data_offsets for tensor in tensors):
        if begin != end or after < begin:
            raise ValueError("tensors overlap, or there is a gap between them")
        end = after
    return end


# ----------------------------------------------------------------------------------------------------------------------
# The hub
# ----------------------------------------------------------------------------------------------------------------------


def choose_files(names: Iterable[str], *, weights: bool = True) -> list[str]:
    """Of a hub repository's files, those to fetch: root-level JSON, tokenizer files and (in one form) safetensors."""
    names = [n for n in names if "/" not in n]
    small = [n for n in names if _TOKENIZER_FILES.fullmatch(n)]
    return sorted(small + (_choose_weights(names) if weights else []))


def _fetch_from_hub(name: str, revision: str | None, cache: str | None, weights: bool) -> Path:
    """Download what is missing of a hub model (the library shows progress and resumes) and return its folder."""
    import huggingface_hub as hub
    from huggingface_hub import errors as hub_errors

    try:
        listing = hub.HfApi().model_info(name, revision=revision)
        names = [f.rfilename for f in listing.siblings or ()]
        chosen = choose_files(names, weights=weights)
        if weights and SINGLE not in names and INDEX in names:
            index = Path(hub.hf_hub_download(name, INDEX, revision=revision, cache_dir=cache))
            chosen = sorted({*choose_files(names, weights=False), *_shards(index)})
        elif weights and not any(n.endswith(".safetensors") for n in chosen):
            _raise_no_weights(f"The hub model {name}", names)
        return Path(hub.snapshot_download(name, revision=revision, cache_dir=cache, allow_patterns=chosen))
    except hub_errors.GatedRepoError:
        raise ModelNotFound(
            f"The hub model {name} is gated: accept its terms on its page, then run `hf auth login` on this machine."
        ) from None
    except hub_errors.RevisionNotFoundError:
        raise ModelNotFound(f"The hub model {name} has no revision {revision!r}; see its page for branches and tags.") from None
    except hub_errors.RepositoryNotFoundError:
        raise ModelNotFound(
            f"There is neither a folder nor a hub model {name}{_similar(Path(name))}; check the spelling, or run "
            "`hf auth login` if it is private."
        ) from None
    except hub_errors.HFValidationError as error:
        raise ModelNotFound(f"{name!r} is neither a folder nor a possible hub name: {error}.") from None
    except (BrokenModelFolder, PicklesOnly):
        raise
    # The HTTP library beneath differs between versions (requests, httpx, httpx2), and so do the types of its failures:
    # whatever went wrong on the way, a copy from an earlier run serves, and without one the user gets the reason.
    except Exception as error:
        if (kept := _from_cache(name, revision, cache)) is not None:
            return kept
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelNotFound(
            f"There is no folder {name}{_similar(Path(name))}, and it could not be fetched from the hub ({reason}); "
            "check the network and HF_ENDPOINT, or give a local folder."
        ) from error


def _from_cache(name: str, revision: str | None, cache: str | None) -> Path | None:
    """The folder of an earlier download, if there is one; ``check_folder`` finds out whether it is whole."""
    import huggingface_hub as hub

    with contextlib.suppress(Exception):  # see above: any failure means that there is no copy
        config = hub.hf_hub_download(name, "config.json", revision=revision, cache_dir=cache, local_files_only=True)
        return Path(config).parent
    return None
