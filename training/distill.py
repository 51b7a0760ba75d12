"""What the students learn from: stories that the teachers write, and the teachers' opinion of every token.

The text is small: a model that reads it thirty times begins to know it by heart. The teachers, each regularised
heavily, are averaged; the average is better than any of them, and it can say of any text, its own stories included,
how likely each next token is. A student that reads the teachers' stories with those opinions never runs out of text.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from training.corpus import CORE_SOURCES, Corpus, Documents, Windows, epoch_windows, pack
from training.evaluate import average_log_probs
from training.generate import generate
from training.loop import Pool
from training.model import Llama
from training.recipe import PoolPlan
from training.text import ChatMaker, Message, Story, Words
from training.tokenizer import END_OF_TEXT, IM_END, render_question, special_id

Document = tuple[list[int], list[bool]]  # ids, and which of them to learn


@dataclass(frozen=True)
class Ask:
    """A question for a teacher, and the words that its answer has to hold."""

    question: str
    wanted: tuple[str, ...] = ()


def make_asks(stories: Sequence[Story], count: int, seed: int) -> list[Ask]:
    """Questions of every kind; most ask for three words, some of them from two stories that never met."""
    words = Words.count(stories)
    maker = ChatMaker(words, seed)
    pick = random.Random(seed + 1)
    asks: list[Ask] = []
    while len(asks) < count:
        story = pick.choice(stories).text
        candidates = words.of(story)
        if pick.random() < 0.3:
            candidates = sorted({*candidates, *words.of(pick.choice(stories).text)})
        if pick.random() < 0.6 and len(candidates) >= 3:
            three = pick.sample(candidates, 3)
            asks.append(Ask(maker.ask_words(three), tuple(three)))
        else:
            asks.append(Ask(maker.request(story)[0].content))
    return asks


def has_words(text: str, wanted: Sequence[str]) -> bool:
    """Whether each word occurs, inflected or not ("jump" is in "jumped")."""
    return all(re.search(rf"\b{word}", text, re.IGNORECASE) for word in wanted)


def write_stories(
    model: Llama, tokenizer: Tokenizer, stories: Sequence[Story], plan: PoolPlan, share: int, seed: int
) -> list[Document]:
    """One teacher's part of the pool: 1/share of it. Stories that do not end, or miss an asked word, are dropped."""
    stops = [special_id(tokenizer, END_OF_TEXT), special_id(tokenizer, IM_END)]
    end, chat_end = stops
    pick = random.Random(seed)
    core = [story for story in stories if story.source in CORE_SOURCES] or stories
    openings = [tokenizer.encode(pick.choice(core).text[:120]).ids for _ in range(plan.plain_stories // share)]
    prompts = [ids[: pick.randint(1, 12)] for ids in openings]  # a few true tokens, so that stories differ
    written = _generate_all(model, prompts, stops, plan, plan.plain_temperature, seed)
    documents: list[Document] = [(ids, [True] * len(ids)) for ids in written if ids[-1] == end]
    asks = make_asks(stories, plan.chats // share, seed)
    rendered = [render_question([Message("user", ask.question)]) for ask in asks]
    questions = [encoding.ids for encoding in tokenizer.encode_batch(rendered)]
    kept = [(ask, ids) for ask, ids in zip(asks, questions, strict=True) if len(ids) < plan.max_tokens // 2]
    newline = tokenizer.encode("\n").ids
    answers = _generate_all(model, [ids for _, ids in kept], stops, plan, plan.chat_temperature, seed + 1)
    for (ask, question), ids in zip(kept, answers, strict=True):
        if ids[-1] == chat_end and has_words(tokenizer.decode(ids[len(question) :]), ask.wanted):
            learn = [False] * len(question) + [True] * (len(ids) - len(question)) + [False] * (len(newline) + 1)
            documents.append((ids + newline + [end], learn))
    return documents


def _generate_all(
    model: Llama, prompts: Sequence[list[int]], stops: Sequence[int], plan: PoolPlan, temperature: float, seed: int
) -> list[list[int]]:
    written: list[list[int]] = []
    for first in range(0, len(prompts), plan.batch):
        batch = prompts[first : first + plan.batch]
        written += generate(model, batch, stops, plan.max_tokens, temperature, seed * 1000 + first)
    return written


def save_documents(documents: Sequence[Document], path: Path) -> None:
    joined = Documents.join(documents) if documents else Documents.join([([0], [False])])
    save_file({"ids": joined.ids, "learn": joined.learn, "starts": joined.starts}, path)


def pool_windows(corpus: Corpus, written: Sequence[Path], plan: PoolPlan, chat_share: float, window: int) -> Windows:
    """The text several times over and all that the teachers wrote, as rows of one length."""
    parts = [epoch_windows(corpus, epoch, 77, chat_share, window) for epoch in range(plan.text_epochs)]
    documents = []
    for path in written:
        tensors = load_file(path)
        one = Documents(tensors["ids"], tensors["learn"], tensors["starts"])
        documents += [one.document(index) for index in range(len(one))]
    random.Random(78).shuffle(documents)
    middle = len(documents) // 2
    parts += [pack(documents[:middle], window, aligned=True), pack(documents[middle:], window, aligned=False)]
    return Windows(torch.cat([part.ids for part in parts]), torch.cat([part.learn for part in parts]))


@torch.no_grad()
def label(windows: Windows, models: Sequence[Llama], top: int, device: torch.device, rows_per_batch: int = 16) -> Pool:
    """The average of the models' distributions at every position, its `top` most likely tokens kept."""
    top_ids, top_probs = [], []
    for first in range(0, len(windows), rows_per_batch):
        ids = windows.ids[first : first + rows_per_batch]
        log_probs = average_log_probs(models, ids[:, :-1].to(device, torch.int64))  # [rows, window, vocab]
        best, picks = log_probs.topk(top, dim=-1)
        top_ids.append(picks.to(torch.int16))
        top_probs.append(best.exp().to(torch.bfloat16))
    moved = Windows(windows.ids.to(device), windows.learn.to(device))
    return Pool(moved, torch.cat(top_ids), torch.cat(top_probs))


def save_pool(pool: Pool, path: Path) -> None:
    tensors = {"ids": pool.windows.ids, "learn": pool.windows.learn}
    save_file(tensors | {"top_ids": pool.top_ids, "top_probs": pool.top_probs}, path)


def load_pool(path: Path, device: torch.device) -> Pool:
    tensors = load_file(path, device=str(device))
    return Pool(Windows(tensors["ids"], tensors["learn"]), tensors["top_ids"], tensors["top_probs"])
