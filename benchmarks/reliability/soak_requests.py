"""Requests of every kind for the soak: completions and chats, grammars, long prompts, logprobs, bad ones; and the canary's."""

import random
from collections.abc import Callable
from itertools import cycle
from typing import Any, Final

STORY: Final = "Once upon a time there was a small fox who lived near the river with his mother. "
SCHEMAS: Final = 6000  # more than the engine keeps compiled
FAVOURITES: Final = 20  # of more that come again and again
CANARY: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    ("/v1/completions", {"prompt": STORY, "max_tokens": 24, "seed": 5, "n": 2, "logprobs": 3, "ignore_eos": True}),
    ("/v1/chat/completions",
     {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 16, "temperature": 0, "stream": True,
      "logprobs": True, "top_logprobs": 2}),
)  # fmt: skip
BAD: Final[tuple[dict[str, Any], ...]] = (
    {"n": 0}, {"temperature": -1}, {"structured_outputs": {"json": {"type": "wolf"}}}, {"structured_outputs": {"regex": "(a"}},
    {"prompt": "word " * 3000}, {"logprobs": 10**6}, {"max_tokens": "x"}, {"stop": [""]}, {"guided_regex": "a"},
    {"min_tokens": -1},
)  # fmt: skip

Drawn = tuple[str, str, dict[str, Any], int]  # its kind, path, body and the status that it must get


def schema(number: int) -> dict[str, Any]:
    """One of many, each a grammar of its own."""
    rng = random.Random(number)
    leaves: list[dict[str, Any]] = [
        {"type": "integer"}, {"type": "boolean"}, {"type": "string", "maxLength": rng.randint(3, 40)},
        {"enum": [f"{word}{number}" for word in ("red", "blue", "green")]}, {"type": "number"}, {"type": "null"},
        {"type": "array", "items": {"type": "integer"}, "maxItems": rng.randint(1, 9)},
    ]  # fmt: skip
    names = [f"f{number}_{i}" for i in range(rng.randint(1, 6))]
    return {"type": "object", "properties": {name: rng.choice(leaves) for name in names}, "required": names}


def every_token() -> Drawn:
    """The text of all tokens of the bundled model's vocabulary."""
    return "tokens to begin with", "/detokenize", {"tokens": list(range(4096))}, 200


class Kinds:
    """Draws requests, the same for a seed as long as it is asked in the same order. Written by ``draw``."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        numbers = list(range(SCHEMAS))
        rng.shuffle(numbers)
        self._schemas = cycle(numbers)  # all of them, before one comes again: by then it has made room for others
        self._kinds: list[tuple[float, Callable[[], Drawn]]] = [
            (0.30, self._completion), (0.20, self._chat), (0.15, self._grammar), (0.10, self._long),
            (0.08, self._prompt_logprobs), (0.07, self._tokenize), (0.10, self._bad),
        ]  # fmt: skip

    def draw(self) -> Drawn:
        """The next one."""
        weights = [weight for weight, _ in self._kinds]
        return self.rng.choices([kind for _, kind in self._kinds], weights)[0]()

    def _prompt(self) -> str:
        return f"{self.rng.randint(0, 300)}. " + STORY[: self.rng.randint(10, len(STORY))]

    def _common(self) -> dict[str, Any]:
        rng = self.rng
        body: dict[str, Any] = {"max_tokens": rng.randint(1, 64), "stream": rng.random() < 0.5, "seed": rng.randint(0, 10**6)}
        if rng.random() < 0.4:
            body["n"] = rng.randint(2, 4)
        if rng.random() < 0.3:
            body["stop"] = rng.choice([["."], ["fox", " the"], "\n", ["never to be found"]])
        if rng.random() < 0.3:
            penalties = [{"top_p": 0.8, "repetition_penalty": 1.1}, {"top_k": 20, "frequency_penalty": 0.5}]
            body |= rng.choice([{"temperature": 0, "n": 1}, *penalties])
        return body

    def _completion(self) -> Drawn:
        body = {"prompt": self._prompt(), **self._common()}
        if self.rng.random() < 0.3:
            body["logprobs"] = self.rng.randint(0, 5)
        return "completion", "/v1/completions", body, 200

    def _chat(self) -> Drawn:
        body = {"messages": [{"role": "user", "content": self._prompt()}], **self._common()}
        if self.rng.random() < 0.3:
            body |= {"logprobs": True, "top_logprobs": self.rng.randint(0, 5)}
        return "chat", "/v1/chat/completions", body, 200

    def _grammar(self) -> Drawn:
        if self.rng.random() < 0.3:
            return self._under(schema(SCHEMAS + self.rng.randrange(FAVOURITES)))
        return self.new_grammar()

    def new_grammar(self) -> Drawn:
        """A request under a grammar that is not known, or no longer."""
        return self._under(schema(next(self._schemas)))

    def new_words(self, count: int) -> Drawn:
        """A text of words that nobody wrote before."""
        return "words to begin with", "/tokenize", {"prompt": " ".join(f"w{self.rng.random()}" for _ in range(count))}, 200

    def _under(self, found: dict[str, Any]) -> Drawn:
        if self.rng.random() < 0.5:
            body = {"prompt": self._prompt(), **self._common(), "structured_outputs": {"json": found}}
            return "grammar", "/v1/completions", body, 200
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": found}}
        messages = [{"role": "user", "content": self._prompt()}]
        return "grammar", "/v1/chat/completions", {"messages": messages, **self._common(), "response_format": form}, 200

    def _long(self) -> Drawn:
        body = {"prompt": f"{self.rng.random()} " + STORY * self.rng.randint(15, 40), **self._common()}
        return "long prompt", "/v1/completions", body, 200

    def _prompt_logprobs(self) -> Drawn:
        body = {"prompt": self._prompt(), **self._common(), "prompt_logprobs": self.rng.randint(0, 5), "stream": False}
        return "prompt logprobs", "/v1/completions", body, 200

    def _tokenize(self) -> Drawn:
        return "tokenize", "/tokenize", {"prompt": self._prompt() * self.rng.randint(1, 20)}, 200

    def _bad(self) -> Drawn:
        return "bad", "/v1/completions", {"prompt": "Hi", "max_tokens": 4, **self.rng.choice(BAD)}, 400
