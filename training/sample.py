"""Prints samples of an exported folder: `python -m training.sample minivllm/assets/stories`.

Reading them is half of choosing a model; the loss is the other half.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from training.export import load_exported
from training.generate import generate
from training.text import Message
from training.tokenizer import END_OF_TEXT, IM_END, render_question, special_id

COMPLETIONS = ("Once upon a time", "Tom had a red ball.", "One day, a little girl named Mia found a shell.")
QUESTIONS = (
    "Tell me a story with the words tree, cat and happy.",
    "Tell me a story about a girl named Lily.",
    "Write a short story that begins with: One day, a big bear was hungry.",
    "Continue this story: Ben found a key in the snow.",
    "Hello!",
)
ANOTHER = "Tell me another one."


def sample(folder: Path, temperature: float, seed: int, max_tokens: int) -> list[tuple[str, str]]:
    """Pairs of prompt and continuation: the completions, the chats, and one chat of two turns."""
    model, tokenizer = load_exported(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    stops = [special_id(tokenizer, END_OF_TEXT), special_id(tokenizer, IM_END)]

    def answers(prompts: Sequence[str], seed: int) -> list[str]:
        ids = [tokenizer.encode(prompt).ids for prompt in prompts]
        rows = generate(model, ids, stops, max_tokens, temperature, seed)
        return [
            tokenizer.decode(row[len(prompt) :], skip_special_tokens=False)
            for row, prompt in zip(rows, ids, strict=True)
        ]

    asked = [render_question([Message("user", question)]) for question in QUESTIONS]
    prompts = [*COMPLETIONS, *asked]
    samples = list(zip(prompts, answers(prompts, seed), strict=True))
    first = samples[len(COMPLETIONS)][1].removesuffix(IM_END)
    turns = [Message("user", QUESTIONS[0]), Message("assistant", first), Message("user", ANOTHER)]
    second = render_question(turns)
    return [*samples, (second, answers([second], seed + 1)[0])]


def main() -> None:
    parser = argparse.ArgumentParser(prog="training.sample", description="Print samples of an exported model.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=500, help="Of prompt and answer together.")
    options = parser.parse_args()
    for prompt, answer in sample(options.folder, options.temperature, options.seed, options.max_tokens):
        print(f">>> {prompt}\n{answer}\n")


if __name__ == "__main__":
    main()
