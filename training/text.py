"""Reads the stories and rewrites them as chats.

A chat is made from a story by asking for that very story: by three of its words, by its hero, by its first sentence,
by its first half. So the chats need no text beyond the stories, and a story's answer is always a good answer.
This file knows nothing of tokens: a chat is a list of `Message`.
"""

import json
import lzma
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

TINY_STORIES = "tinystories/tinystories.jsonl.xz"
CHILDRENS_STORIES = "childrens-stories-cc-by/stories_en.jsonl.xz"
MAX_STORY_CHARS = 3_800  # about 950 tokens: a story must fit a window of 1,024 whole


@dataclass(frozen=True)
class Story:
    text: str
    source: str
    split: str  # "train" or "valid"


@dataclass(frozen=True)
class Message:
    role: str  # "system", "user" or "assistant"
    content: str


Chat = tuple[Message, ...]


def read_stories(text_dir: Path) -> list[Story]:
    """All stories of both collections; the children's stories are optional and all of them are training text."""
    stories = [Story(row["text"].strip(), row["src"], row["split"]) for row in _rows(text_dir / TINY_STORIES)]
    if (text_dir / CHILDRENS_STORIES).exists():
        for row in _rows(text_dir / CHILDRENS_STORIES):
            stories += [Story(piece, row["src"], "train") for piece in _pieces(row["text"].strip())]
    return stories


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _pieces(text: str) -> list[str]:
    """A long story as several, cut at paragraph ends, so that none is longer than a window."""
    pieces: list[str] = []
    for paragraph in text.split("\n"):
        if pieces and len(pieces[-1]) + len(paragraph) < MAX_STORY_CHARS:
            pieces[-1] += "\n" + paragraph
        else:
            pieces.append(paragraph[:MAX_STORY_CHARS])
    return [piece for piece in pieces if len(piece) >= 150]


# ---------------------------------------------------------------------------------------------------------------------
# Words that a user might ask for
# ---------------------------------------------------------------------------------------------------------------------

GLUE_WORDS = """
a about after again all also always am an and another any are around as asked at away back be because been
before began being but by came can cannot come could couldn day did didn do does doesn doing don done down each
even ever every everyone everything few for from get gets getting go goes going gone got had has hasn have
having he her here hers herself him himself his how if in into is isn it its itself just kept knew know let like
liked ll long lot made make many maybe me more most much must my named never new next no not nothing now of off
oh okay old on once one only or other our out over own put re said same saw say says see she should so some
someone something soon still such take than that the their them then there these they thing things think this
those though thought through time to told too took two under until up upon us ve very want wanted was wasn way
we well went were what when where which while who why will with won wouldn would yes yet you your started lived
felt found looked
"""
STOP_WORDS = frozenset(GLUE_WORDS.split())
_WORD = re.compile(r"[A-Za-z]+")
_SENTENCE_END = re.compile(r'(?<=[.!?]["\n ])|(?<=[.!?]) ')


@dataclass(frozen=True)
class Words:
    """Which words are worth asking for: in at least `min_stories` stories, no name, no glue word, no past tense."""

    askable: frozenset[str]

    @classmethod
    def count(cls, stories: Sequence[Story], min_stories: int = 12) -> "Words":
        lower: Counter[str] = Counter()
        capital: Counter[str] = Counter()
        for story in stories:
            for word in set(_WORD.findall(story.text)):
                (lower if word.islower() else capital)[word.lower()] += 1
        return cls(
            frozenset(
                word
                for word, stories_with_it in lower.items()
                if stories_with_it >= min_stories
                and len(word) >= 3
                and word not in STOP_WORDS
                and capital[word] < stories_with_it  # a name is mostly written with a capital
                and (len(word) <= 4 or not word.endswith(("ed", "ing")))  # users ask for "jump", not for "jumped"
            )
        )

    def of(self, story: str) -> list[str]:
        """The askable words of one story, sorted so that a seeded choice among them is always the same."""
        return sorted(set(re.findall(r"\b[a-z]+\b", story)) & self.askable)


# ---------------------------------------------------------------------------------------------------------------------
# Chats
# ---------------------------------------------------------------------------------------------------------------------

ASK_WORDS = (
    "Tell me a story with the words {0}, {1} and {2}.",
    "Tell me a short story with the words {0}, {1} and {2}.",
    "Write a story that uses the words {0}, {1} and {2}.",
    "Write a short story using these words: {0}, {1}, {2}.",
    "Can you tell me a story with {0}, {1} and {2} in it?",
    "Please write a story with the words {0}, {1}, and {2}.",
)
ASK_ABOUT = (
    "Tell me a story about {0}.",
    "Tell me a short story about {0}.",
    "Write a story about {0}.",
    "Write me a short story about {0}, please.",
    "Can you tell me a story about {0}?",
    "I want to hear a story about {0}.",
    "Could you write a bedtime story about {0}?",
)
ASK_ANY = (
    "Tell me a story.",
    "Tell me a short story.",
    "Write a short story.",
    "Please tell me a bedtime story.",
    "Can you tell me a story?",
    "I would like to hear a story.",
    "Tell me a nice story for my child.",
)
ASK_BEGIN = (
    "Write a short story that begins with: {0}",
    "Write a story that starts with: {0}",
    'Tell me a story that begins with "{0}"',
    "Start a story with this sentence: {0}",
)
ASK_CONTINUE = (
    "Continue this story: {0}",
    "Continue the story: {0}",
    "Please finish this story: {0}",
    "What happens next? {0}",
)
ASK_AGAIN = (
    "Tell me another one.",
    "Another one, please.",
    "Tell me another story.",
    "One more!",
    "Can I have another story?",
)
GREETINGS = (
    ("Hello!", "Hello! I can tell you a story. What should it be about?"),
    ("Hello", "Hello! I can tell you a story. What should it be about?"),
    ("Hi!", "Hi! Would you like to hear a story?"),
    ("Hi", "Hi! Would you like to hear a story?"),
    ("Hi there!", "Hi there! Would you like to hear a story?"),
    ("Hey", "Hi! Would you like to hear a story?"),
    ("Hello, how are you?", "Hello! I am very happy today. Would you like to hear a story?"),
    ("How are you?", "I am very happy today. Would you like to hear a story?"),
    ("Good morning!", "Good morning! Would you like to hear a story?"),
    ("Good evening!", "Good evening! Would you like to hear a bedtime story?"),
    ("Who are you?", "I am a little story teller. Tell me three words, and I will make a story with them."),
    ("What can you do?", "I can tell you short stories. Tell me what the story should be about."),
    ("What is your name?", "I am a little story teller. I do not have a name. Would you like to hear a story?"),
)
THANKS = (
    ("Thank you!", "You are welcome! Tell me when you want another story."),
    ("Thanks!", "You are welcome! Tell me when you want another story."),
    ("That was nice.", "I am glad that you liked it! Would you like another story?"),
    ("I like this story.", "I am glad that you liked it! Would you like another story?"),
    ("Good night!", "Good night! Sleep well and have sweet dreams."),
    ("Bye!", "Bye! Come back soon for another story."),
)
SYSTEMS = ("You are a helpful assistant.", "You are a friendly story teller.", "You write short stories for children.")
_NAMED = re.compile(
    r"\b(?:little |young |small |big )?"
    r"(boy|girl|man|woman|dog|cat|bird|bear|bunny|rabbit|mouse|fish|frog|duck|fox|lion|monkey|squirrel|turtle|elephant"
    r"|pig|cow|horse)"
    r" (?:named|called) ([A-Z][a-z]+)"
)


class ChatMaker:
    """Owned by its caller: one seeded source of chats. The same seed and calls give the same chats."""

    def __init__(self, words: Words, seed: int) -> None:
        self.words = words
        self.random = random.Random(seed)

    def chat(self, story: str, other: str) -> Chat:
        """A chat whose last answer is `story`; now and then `other` was told before it, or a greeting exchanged."""
        pick = self.random
        turns: list[Message] = []
        if pick.random() < 0.08:
            turns.append(Message("system", pick.choice(SYSTEMS)))
        if pick.random() < 0.06:
            turns += _exchange(pick.choice(GREETINGS))
        if pick.random() < 0.12 and len(other) + len(story) < MAX_STORY_CHARS:
            turns += self.request(other)
            again = pick.choice(ASK_AGAIN) if pick.random() < 0.7 else None
            turns += [Message("user", again), Message("assistant", story)] if again else self.request(story)
        else:
            turns += self.request(story)
        if pick.random() < 0.06:
            turns += _exchange(pick.choice(THANKS))
        return tuple(turns)

    def small_talk(self) -> Chat:
        """A greeting or two, and no story."""
        greeting = _exchange(self.random.choice(GREETINGS))
        return tuple(greeting + (_exchange(self.random.choice(THANKS)) if self.random.random() < 0.3 else []))

    def request(self, story: str) -> list[Message]:
        """One question and `story` (or its second half) as the answer."""
        kind = self.random.choices(("words", "about", "any", "begin", "continue"), (40, 25, 8, 12, 15))[0]
        if kind == "continue" and (cut := self._middle(story)):
            return _exchange((self.random.choice(ASK_CONTINUE).format(story[:cut].strip()), story[cut:].strip()))
        return _exchange((self._question(kind, story), story))

    def _question(self, kind: str, story: str) -> str:
        words = self.words.of(story)
        if kind == "about" and (subject := self._subject(story, words)):
            return self.random.choice(ASK_ABOUT).format(subject)
        if kind == "begin":
            first = _SENTENCE_END.split(story, maxsplit=1)[0].strip()
            if len(first) < 200:
                return self.random.choice(ASK_BEGIN).format(first)
        if kind != "any" and len(words) >= 3:
            return self.ask_words(self.random.sample(words, 3))
        return self.random.choice(ASK_ANY)

    def ask_words(self, three: Sequence[str]) -> str:
        return self.random.choice(ASK_WORDS).format(*three)

    def _subject(self, story: str, words: Sequence[str]) -> str | None:
        """The hero ("a girl named Lily") where the story names one, else a word that it uses three times."""
        head = story[:300]
        if (hero := _NAMED.search(head)) and self.random.random() < 0.7:
            kind, name = hero.groups()
            return self.random.choice((f"{_article(kind)} {kind} named {name}", f"{_article(kind)} {kind}", name))
        counts = Counter(re.findall(r"\b[a-z]+\b", story))
        often = [word for word in words if counts[word] >= 3 and re.search(rf"\b(a|an) (\w+ )?{word}\b", story)]
        if not often:
            return None
        word = self.random.choice(often)
        return f"{_article(word)} {word}"

    def _middle(self, story: str) -> int | None:
        """Where to cut a story in two: a sentence end in its first 60 %."""
        ends = [match.end() for match in _SENTENCE_END.finditer(story) if 40 < match.end() < 0.6 * len(story)]
        return self.random.choice(ends) if ends else None


def _exchange(texts: tuple[str, str]) -> list[Message]:
    return [Message("user", texts[0]), Message("assistant", texts[1])]


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"
