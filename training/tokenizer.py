"""Trains the byte-level BPE tokenizer and writes it in the Hugging Face layout, chat template included.

Byte-level means that no text is unknown: the 256 bytes are in the vocabulary, and every merge only makes text shorter.
The tokenizer adds nothing by itself (no beginning-of-text token): what a prompt says is what the model sees.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from training.text import Chat, Message

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)  # ids 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` entries, special tokens included (fewer only if the text is tiny)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token, which every tokenizer made here has."""
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None, f"the tokenizer lacks {token}"
    return token_id


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_tokens: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [IM_START, IM_END],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_tokens,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def render_chat(chat: Chat) -> list[tuple[str, bool]]:
    """A chat as pieces of text, each with whether the model is to learn it: only what the assistant says.

    Joined, the pieces are what CHAT_TEMPLATE renders; a test holds the two together.
    """
    pieces: list[tuple[str, bool]] = []
    for message in chat:
        pieces.append((f"{IM_START}{message.role}\n", False))
        pieces.append((f"{message.content}{IM_END}", message.role == "assistant"))
        pieces.append(("\n", False))
    return pieces


def render_question(messages: Sequence[Message]) -> str:
    """What the model is given before it answers: the chat so far, and the opening of its own turn."""
    return "".join(text for text, _ in render_chat(tuple(messages))) + f"{IM_START}assistant\n"
