"""What every face does before a request, or a model, reaches the engine: one place, so no face can skip a check."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import msgspec

from minivllm.config import Config
from minivllm.errors import ContextTooLong, InvalidOption, InvalidRequest
from minivllm.model_files import read_json
from minivllm.models.hub import fetch_model
from minivllm.types import SamplingParams

DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # what a generation_config.json may set here


class Encodes(Protocol):
    """What makes texts into tokens."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``."""
        ...


def settle(sampling: SamplingParams, num_prompt: int, max_model_len: int, drawn_seed: int) -> SamplingParams:
    """Fill in what depends on the prompt and the moment: the output limit and the seed. What comes out is of one of the texts
    that ``n`` asks for. Raises ``ContextTooLong`` when prompt and output do not fit the context."""
    max_tokens = sampling.max_tokens if sampling.max_tokens is not None else max(max_model_len - num_prompt, 1)
    if num_prompt + max_tokens > max_model_len:
        raise ContextTooLong(max_model_len, num_prompt, max_tokens)
    seed = sampling.seed if sampling.seed is not None else drawn_seed
    return msgspec.structs.replace(sampling, n=1, max_tokens=max_tokens, seed=seed)


def sampling_defaults(config: Config, model_folder: Path) -> dict[str, Any]:
    """What /v1 requests get where they say nothing: the generation_config.json that the options name, and what
    ``--override-generation-config`` says over it. Raises ``StartupError`` subclasses for what cannot be read or used."""
    source = config.model.generation_config
    found: dict[str, Any] = {}
    if source != "vllm":
        path = (model_folder if source == "auto" else Path(source)) / "generation_config.json"
        found = read_json(path) if source != "auto" or path.is_file() else {}
    if (override := config.model.override_generation_config) is not None:
        found |= _override(override)
    defaults = {name: found[name] for name in DEFAULTED if found.get(name) is not None}
    try:
        whole = msgspec.convert(defaults, SamplingParams)  # types and ranges
        return {name: getattr(whole, name) for name in defaults}
    except (InvalidRequest, msgspec.ValidationError) as error:
        raise InvalidOption(
            f"The sampling defaults {defaults} cannot be used: {error} Use --generation-config vllm to do without them."
        ) from None


def _override(text: str) -> dict[str, Any]:
    """The value of ``--override-generation-config``."""
    try:
        found = msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError:
        raise InvalidOption(
            f"--override-generation-config must be a JSON object such as {{\"temperature\": 0.5}}, got {text!r}."
        ) from None
    if unknown := sorted(found.keys() - set(DEFAULTED)):
        raise InvalidOption(f"--override-generation-config knows {', '.join(DEFAULTED)}, but not {', '.join(unknown)}.")
    return found


def spell(sampling: SamplingParams, tokenizer: Encodes, vocab_size: int, max_logprobs: int) -> SamplingParams:
    """Check what names tokens, and settle which tokens ``bad_words`` are written with: each as it is and as it follows a space,
    in the way that the tokenizer writes it. (A model may find other tokens for the same letters.) Raises ``InvalidRequest``."""
    for name, count in (("logprobs", sampling.logprobs), ("prompt_logprobs", sampling.prompt_logprobs)):
        if count is not None and count > min(max_logprobs, vocab_size):
            raise InvalidRequest(f"This server tells logprobs of at most {max_logprobs} tokens (--max-logprobs).", name)
    named = {"logit_bias": [token for token, _ in sampling.logit_bias], "allowed_token_ids": sampling.allowed_token_ids or ()}
    for name, ids in named.items():
        if any(not 0 <= token < vocab_size for token in ids):
            raise InvalidRequest(f"{name} names token ids outside the vocabulary of {vocab_size} tokens.", name)
    if any(not 0 <= token < vocab_size for ids in sampling.bad_word_ids for token in ids):
        raise InvalidRequest(f"bad_words names token ids outside the vocabulary of {vocab_size} tokens.", "bad_words")
    if not sampling.bad_words:
        return sampling
    spelled: dict[tuple[int, ...], None] = {}
    for word in sampling.bad_words:
        for prefix in ("", " "):
            spelled[tuple(tokenizer.encode(prefix + word.lstrip(), False))] = None
    return msgspec.structs.replace(sampling, bad_word_ids=tuple(ids for ids in spelled if ids and max(ids) < vocab_size))


def check_prompt(prompt_ids: Sequence[int], vocab_size: int) -> None:
    """Raise ``InvalidRequest`` for a prompt that no model could take."""
    if not prompt_ids:
        raise InvalidRequest("The prompt is empty; send at least one token.", "prompt")
    if min(prompt_ids) < 0 or max(prompt_ids) >= vocab_size:
        raise InvalidRequest(f"The prompt holds token ids outside the vocabulary of {vocab_size} tokens.", "prompt")


def locate(config: Config) -> tuple[Config, Path]:
    """Fetch the model if need be: the options with local folders as ``model`` and ``tokenizer``, and the model's. Raises
    ``StartupError``."""
    names, model = config.served_names, config.model
    folder = fetch_model(model.model, model.revision, model.download_dir, weights=model.load_format != "dummy")
    words = None if model.tokenizer is None else str(fetch_model(model.tokenizer, None, model.download_dir, weights=False))
    return replace(config, model=replace(model, model=str(folder), tokenizer=words, served_model_name=names)), folder


def tokenizer_folder(config: Config, model_folder: Path) -> Path:
    """Where the tokenizer's files are; ``config`` comes from ``locate``."""
    return model_folder if config.model.tokenizer is None else Path(config.model.tokenizer)
