"""Token ids of every document, and their packing into windows of one length.

A document is a story followed by `<|endoftext|>`, or a chat followed by it. Documents lie end to end in one flat
tensor; an epoch shows every story once, as plain text or as one of several chats, in a new order. Half the epochs are
cut as one stream (windows begin anywhere), half are cut so that every window begins with a document, because that is
how every request will begin.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from training.text import Chat, ChatMaker, Story, Words
from training.tokenizer import END_OF_TEXT, render_chat, special_id

CORE_SOURCES = ("train-sample-a", "train-sample-b")  # written as the validation stories were: see `Corpus.is_core`


@dataclass(frozen=True)
class Documents:
    """Many documents end to end; `learn` marks the tokens that a model is trained to predict."""

    ids: Tensor  # int32 [tokens]
    learn: Tensor  # bool [tokens]
    starts: Tensor  # int64 [documents + 1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def document(self, index: int) -> tuple[Tensor, Tensor]:
        span = slice(int(self.starts[index]), int(self.starts[index + 1]))
        return self.ids[span], self.learn[span]

    @classmethod
    def join(cls, documents: Sequence[tuple[list[int], list[bool]]]) -> "Documents":
        lengths = torch.tensor([0] + [len(ids) for ids, _ in documents])
        return cls(
            torch.tensor([token for ids, _ in documents for token in ids], dtype=torch.int32),
            torch.tensor([flag for _, learn in documents for flag in learn]),
            lengths.cumsum(0),
        )


@dataclass(frozen=True)
class Windows:
    """Rows of one length. Position t of a row is asked for token t + 1, if `learn` says so."""

    ids: Tensor  # int32 [rows, window + 1]
    learn: Tensor  # bool [rows, window]; about the token that follows

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Corpus:
    plain: Documents
    chats: tuple[Documents, ...]  # variants: the same stories asked for in other words; small talk after the stories
    valid: Tensor  # int32 [tokens]: the held-out stories, plain
    valid_bytes: int
    is_core: Tensor  # bool [stories]: from the sources that are most like the validation stories

    def save(self, path: Path) -> None:
        tensors = {"valid": self.valid, "is_core": self.is_core}
        tensors |= {"num_chats": torch.tensor(len(self.chats)), "valid_bytes": torch.tensor(self.valid_bytes)}
        for name, one in (("plain", self.plain), *((f"chat{i}", chat) for i, chat in enumerate(self.chats))):
            tensors |= {f"{name}.ids": one.ids, f"{name}.learn": one.learn, f"{name}.starts": one.starts}
        save_file(tensors, path)

    @classmethod
    def load(cls, path: Path) -> "Corpus":
        tensors = load_file(path)

        def documents(name: str) -> Documents:
            return Documents(*(tensors[f"{name}.{part}"] for part in ("ids", "learn", "starts")))

        chats = tuple(documents(f"chat{i}") for i in range(int(tensors["num_chats"])))
        return cls(documents("plain"), chats, tensors["valid"], int(tensors["valid_bytes"]), tensors["is_core"])


def build_corpus(stories: Sequence[Story], tokenizer: Tokenizer, num_chats: int, seed: int) -> Corpus:
    train = [story for story in stories if story.split == "train"]
    valid = [story for story in stories if story.split == "valid"]
    words = Words.count(train)
    order = random.Random(seed).sample(range(len(train)), len(train))  # whose story is told before whose
    chats = []
    for variant in range(num_chats):
        maker = ChatMaker(words, seed + variant)
        made = [maker.chat(train[index].text, train[order[index]].text) for index in range(len(train))]
        made += [maker.small_talk() for _ in range(len(train) // 50)]
        chats.append(encode_chats(made, tokenizer))
    return Corpus(
        plain=encode_stories([story.text for story in train], tokenizer),
        chats=tuple(chats),
        valid=encode_stories([story.text for story in valid], tokenizer).ids,
        valid_bytes=sum(len(story.text.encode()) for story in valid),
        is_core=torch.tensor([story.source in CORE_SOURCES for story in train]),
    )


def encode_stories(texts: Sequence[str], tokenizer: Tokenizer) -> Documents:
    end = special_id(tokenizer, END_OF_TEXT)
    encoded = [encoding.ids + [end] for encoding in tokenizer.encode_batch(list(texts))]
    return Documents.join([(ids, [True] * len(ids)) for ids in encoded])


def encode_chats(chats: Sequence[Chat], tokenizer: Tokenizer) -> Documents:
    """Chats as ids; a piece of a chat ends in a special token or a newline, so encoding by piece changes nothing."""
    pieces = [(row, text, learn) for row, chat in enumerate(chats) for text, learn in render_chat(chat)]
    encoded = tokenizer.encode_batch([text for _, text, _ in pieces])
    documents: list[tuple[list[int], list[bool]]] = [([], []) for _ in chats]
    for (row, _, learn), encoding in zip(pieces, encoded, strict=True):
        documents[row][0].extend(encoding.ids)
        documents[row][1].extend([learn] * len(encoding.ids))
    end = special_id(tokenizer, END_OF_TEXT)
    return Documents.join([(ids + [end], learn + [False]) for ids, learn in documents])


def epoch_windows(
    corpus: Corpus, epoch: int, seed: int, chat_share: float, window: int, core_only: bool = False
) -> Windows:
    """Every story once (or every core story), `chat_share` of them as a chat."""
    pick = random.Random(seed * 1000 + epoch)
    chat = corpus.chats[epoch % len(corpus.chats)]
    stories = [index for index, is_core in enumerate(corpus.is_core.tolist()) if is_core or not core_only]
    documents = [
        chat.document(index) if pick.random() < chat_share else corpus.plain.document(index) for index in stories
    ]
    if chat_share > 0:
        documents += [chat.document(index) for index in range(len(corpus.plain), len(chat))]
    pick.shuffle(documents)
    return pack(documents, window, aligned=epoch % 2 == 1)


def pack(documents: Sequence[tuple[Tensor, Tensor]], window: int, aligned: bool) -> Windows:
    """A stream cut every `window` tokens; or, aligned, rows that begin with a document and lose the last one's end."""
    step = window + 1 if aligned else window  # a stream's rows share a token: the last target is the next first input
    if aligned:
        documents = [piece for row in _rows(documents, window + 1) for piece in row]
    if sum(len(ids) for ids, _ in documents) <= window:
        return Windows(torch.empty(0, window + 1, dtype=torch.int32), torch.empty(0, window, dtype=torch.bool))
    ids = torch.cat([ids for ids, _ in documents]).unfold(0, window + 1, step)
    learn = torch.cat([learn for _, learn in documents]).unfold(0, window + 1, step)
    return Windows(ids.contiguous(), learn[:, 1:].contiguous())


def _rows(documents: Sequence[tuple[Tensor, Tensor]], length: int) -> list[list[tuple[Tensor, Tensor]]]:
    """Documents in rows of exactly `length` tokens; what does not fit its row is dropped, and the last row too."""
    rows: list[list[tuple[Tensor, Tensor]]] = []
    row: list[tuple[Tensor, Tensor]] = []
    room = length
    for ids, learn in documents:
        row.append((ids[:room], learn[:room]))
        room -= len(ids)
        if room <= 0:
            rows.append(row)
            row, room = [], length
    return rows
