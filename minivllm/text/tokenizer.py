"""The tokenizer of a model folder: text to ids and back, special tokens, the chat template.

Reads what the hub's folders hold (``tokenizer.json``, or GPT-2's ``vocab.json`` and ``merges.txt``; ``tokenizer_config.json``,
``special_tokens_map.json``, ``added_tokens.json``, ``chat_template.jinja``) with the tokenizers library alone: transformers
costs seconds to import. Encoding with special tokens gives the ids that transformers' fast tokenizer gives.

Nothing in here changes after loading, apart from caches. Knows nothing of requests or of the model.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from minivllm.errors import BrokenModelFolder, InvalidOption, InvalidRequest, UnsupportedModel
from minivllm.model_files import read_json
from minivllm.text.chat import ChatTemplate
from minivllm.text.detokenizer import Detokenizer, Pieces
from minivllm.text.guard import Guard, GuardedEncoder

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BYTE_LEVEL_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")


class Tokenizer:
    """Text and ids of one model. Made by ``load_tokenizer``; safe to use from several threads."""

    def __init__(
        self, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str], chat_template: ChatTemplate | None
    ) -> None:
        self._backend = backend
        self._chat_template = chat_template
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.bos_id = self._id_of(special_tokens.get("bos_token"))
        self.eos_id = self._id_of(special_tokens.get("eos_token"))
        self.has_chat_template = chat_template is not None
        decoder = None if backend.decoder is None else json.loads(backend.decoder.__getstate__())  # its JSON, as saved
        self._pieces = Pieces(backend, decoder, self.special_ids)
        self.guard = Guard([token.content for token in added.values() if token.special])
        self._guarded: GuardedEncoder | None = None  # made when a message first holds a special token

    def _id_of(self, token: str | None) -> int | None:
        found: int | None = None if token is None else self._backend.token_to_id(token)
        return found

    def known_ids(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """Those of the ids that the vocabulary has (models may have more tokens); where it has none, its last."""
        return tuple(i for i in token_ids if i < self.vocab_size) or (self.vocab_size - 1,)

    def special_id(self, text: str) -> int | None:
        """The id of the special token that is written so; None: there is none."""
        found = self._id_of(text)
        return found if found in self.special_ids else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text; special tokens written out in it become their ids, as in transformers.

        Raises ``InvalidRequest`` for a lone surrogate: JSON can carry one ("\\ud800"), but it is no character.
        """
        _check_characters(text)
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_chat(self, text: str, mark: str, add_special_tokens: bool = False) -> list[int]:
        """The ids of a rendered chat in which ``guard`` put a mark into special tokens that users wrote ("": there were none).

        Raises ``InvalidRequest`` as ``encode`` does.
        """
        if not mark:
            return self.encode(text, add_special_tokens)
        _check_characters(text)
        if self._guarded is None:
            self._guarded = GuardedEncoder(self._backend, self.guard)
        return self._guarded.encode(text, mark, add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence; bytes that are not UTF-8 become U+FFFD, ids the vocabulary lacks become nothing.

        Raises ``InvalidRequest`` for a number that cannot be a token id.
        """
        for token_id in ids:
            if not 0 <= token_id < 2**32:
                raise InvalidRequest(f"{token_id} is not a token id; ids are from 0 to {self.vocab_size - 1}.", "tokens")
        return self._pieces.decode(ids, skip_special_tokens)

    def as_json(self) -> str:
        """The whole tokenizer in the form of a tokenizer.json."""
        text: str = self._backend.to_str()
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for inside a text, special or not."""
        return self._pieces[token_id]

    def token_text(self, token_id: int) -> str:
        """One token as text, special or not; U+FFFD where it holds only a part of a character."""
        return self._pieces[token_id].decode("utf-8", "replace")

    def detokenizer(
        self, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True, shown_ids: frozenset[int] = frozenset()
    ) -> Detokenizer:
        """A stream's way from ids to text, token by token; of the special tokens ``shown_ids`` are never skipped."""
        special = self.special_ids - shown_ids if shown_ids else self.special_ids
        return Detokenizer(self._pieces, prompt_ids, special if skip_special_tokens else frozenset())

    def template(self) -> ChatTemplate:
        """The chat template. Raises ``InvalidRequest`` when there is none."""
        if self._chat_template is None:
            raise InvalidRequest(
                "This model has no chat template; use /v1/completions or start the server with --chat-template FILE.",
                "messages",
            )
        return self._chat_template

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_values: Any,
    ) -> str:
        """The prompt text of a conversation (encode it with ``add_special_tokens=False``: templates write bos themselves).

        Raises ``InvalidRequest`` when there is no template or it refuses the messages.
        """
        return self.template().render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **template_values,
        )


def _check_characters(text: str) -> None:
    """Raise ``InvalidRequest`` for a lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise InvalidRequest(
            f"The text holds a lone surrogate (U+{ord(text[exc.start]):04X}) at character {exc.start}, which is no "
            "character; send valid Unicode.",
            "prompt",
        ) from exc


def load_tokenizer(folder: Path, chat_template: str | None = None) -> Tokenizer:
    """Load the tokenizer of a local model folder; ``chat_template`` is the path of a template file to use instead of its own.

    Raises ``BrokenModelFolder`` (a file is missing or cannot be read), ``UnsupportedModel`` (a kind of tokenizer that is not
    served here) or ``InvalidOption`` (the template file).
    """
    config = _read_json(folder / "tokenizer_config.json")
    backend = _load_backend(folder, config)
    named = {**_special_tokens(_read_json(folder / "special_tokens_map.json")), **_special_tokens(config)}
    _add_tokens(backend, folder, config, named)
    if "add_bos_token" in config or "add_eos_token" in config:
        _set_post_processor(backend, config, named)
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(backend, named, _load_template(folder, config, chat_template, named))


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file that a folder may lack: empty then."""
    return read_json(path) if path.is_file() else {}


def _load_backend(folder: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """The library's tokenizer from whichever files there are."""
    whole, vocab, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    try:
        if whole.is_file():
            return tokenizers.Tokenizer.from_file(str(whole))
        if vocab.is_file() and merges.is_file():
            kind = config.get("tokenizer_class")
            if kind not in _BYTE_LEVEL_CLASSES:
                raise UnsupportedModel(
                    f"{folder} has vocab.json and merges.txt of a {kind}, whose way to split text they do not say; add its "
                    "tokenizer.json."
                )
            return _byte_level_bpe(vocab, merges, bool(config.get("add_prefix_space", False)))
    except UnsupportedModel:
        raise
    except Exception as exc:  # the library raises plain Exception
        raise BrokenModelFolder(f"The tokenizer in {folder} cannot be read ({exc}); fetch the model again.") from exc
    if (folder / "tokenizer.model").is_file():
        raise UnsupportedModel(
            f"{folder} has only a slow SentencePiece tokenizer (tokenizer.model); write a tokenizer.json beside it with "
            "transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    raise BrokenModelFolder(f"{folder} has no tokenizer.json (nor vocab.json with merges.txt); fetch the model again, whole.")


def _byte_level_bpe(vocab: Path, merges: Path, add_prefix_space: bool) -> tokenizers.Tokenizer:
    """GPT-2's tokenizer from its two files."""
    backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Named special tokens (``bos_token`` ...), given as strings or as objects with their ``content``."""
    found: dict[str, str] = {}
    for name in _NAMED:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _add_tokens(backend: tokenizers.Tokenizer, folder: Path, config: dict[str, Any], named: dict[str, str]) -> None:
    """Bring in tokens that only the side files name, and mark the named ones as special.

    Raises ``BrokenModelFolder`` when a token would get another id than the files say.
    """
    stated: dict[int, AddedToken] = {}
    names = set(named.values())
    try:
        for text, token_id in _read_json(folder / "added_tokens.json").items():
            stated[int(token_id)] = AddedToken(text, normalized=False, special=text in names)
        for token_id, fields in (config.get("added_tokens_decoder") or {}).items():
            kept = {k: v for k, v in fields.items() if k in ("lstrip", "rstrip", "single_word", "normalized", "special")}
            stated[int(token_id)] = AddedToken(fields["content"], **kept)
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise BrokenModelFolder(f"The added tokens in {folder} cannot be read ({exc}); fetch the model again.") from exc
    present = backend.get_added_tokens_decoder()
    for token_id, token in sorted(stated.items()):
        if token_id in present and present[token_id].content == token.content:
            continue
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != token_id:
            raise BrokenModelFolder(
                f"The files in {folder} disagree about the id of token {token.content!r}; fetch the model again."
            )
    special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    for text in dict.fromkeys(named.values()):
        # A token the vocabulary lacks would get an id that the model has no row for, so it is left out.
        if text not in special and backend.token_to_id(text) is not None:
            backend.add_special_tokens([AddedToken(text, normalized=False, special=True)])


def _set_post_processor(backend: tokenizers.Tokenizer, config: dict[str, Any], named: dict[str, str]) -> None:
    """Where the config says itself whether bos and eos are put around a text, that beats tokenizer.json, as in transformers."""
    around: list[tuple[str, int]] = []
    template = "$A:0"
    for flag, name, form in (("add_bos_token", "bos_token", "{0}:0 {1}"), ("add_eos_token", "eos_token", "{1} {0}:0")):
        token = named.get(name)
        token_id = None if token is None else backend.token_to_id(token)
        if config.get(flag) and token is not None and token_id is not None:
            around.append((token, token_id))
            template = form.format(token, template)
    backend.post_processor = processors.TemplateProcessing(single=template, pair=f"{template} $B:1", special_tokens=around)


def _load_template(
    folder: Path, config: dict[str, Any], override: str | None, named: Mapping[str, str]
) -> ChatTemplate | None:
    """The chat template: the given file, else chat_template.jinja, else the config's (its "default" when there are several)."""
    own = folder / "chat_template.jinja"
    source: str | None = None
    try:
        if override is not None:
            source = Path(override).read_text(encoding="utf-8")
        elif own.is_file():
            source = own.read_text(encoding="utf-8")
        else:
            stated = config.get("chat_template")
            if isinstance(stated, list):
                stated = {t["name"]: t["template"] for t in stated}.get("default")
            source = stated if isinstance(stated, str) else None
        return None if source is None else ChatTemplate(source, named)
    except (OSError, ValueError, TypeError, KeyError, jinja2.TemplateError) as exc:
        if override is not None:
            raise InvalidOption(f"--chat-template {override} cannot be read as a template ({exc}); give another file.") from exc
        raise BrokenModelFolder(
            f"The chat template in {folder} cannot be read ({exc}); give one with --chat-template FILE."
        ) from exc
