"""The command: text in, two model folders out.

    python -m training.train --text DIR --out DIR            # on a GPU: the whole recipe
    python -m training.train --text DIR --out DIR --smoke    # on two CPU cores in under a minute: the same path, tiny

DIR of --text holds `tinystories/` and, if wanted, `childrens-stories-cc-by/`. The steps, in order: tokenizer and
corpus; the teachers, each of which also writes stories; the pool, labelled by all teachers; the students; the draft,
which learns from the student that ships. `--jobs N` trains N models at once on one GPU: a small model's step is mostly
waiting for launches, so several fit. Every step reads files and writes files under OUT/work, safetensors and JSON only.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from training import distill
from training.corpus import Corpus, build_corpus
from training.evaluate import greedy_agreement, validation_loss
from training.export import export
from training.loop import Pool, train_model
from training.model import Llama
from training.recipe import RECIPE, SMOKE, SMOKE_STORIES, Candidate, Recipe
from training.text import Story, read_stories
from training.tokenizer import train_tokenizer


@dataclass(frozen=True)
class Workshop:
    """Where everything is: the text, the recipe, the device, and the files of one run."""

    text: Path
    out: Path
    smoke: bool
    device: torch.device
    jobs: int
    tokenizer_path: Path | None

    @property
    def recipe(self) -> Recipe:
        return SMOKE if self.smoke else RECIPE

    def file(self, name: str) -> Path:
        return self.out / "work" / name

    def log(self, line: str) -> None:
        print(line, flush=True)

    def train_stories(self) -> list[Story]:
        return [story for story in self.stories() if story.split == "train"]

    def stories(self) -> list[Story]:
        stories = read_stories(self.text)
        if not self.smoke:
            return stories
        return [s for split in ("train", "valid") for s in [x for x in stories if x.split == split][:SMOKE_STORIES]]

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self.file("tokenizer.json")))

    def load_model(self, candidate: Candidate) -> Llama:
        model = Llama(candidate.shape, candidate.plan.seed)
        model.load_state_dict(load_file(self.file(f"{candidate.name}.safetensors")))
        return model.to(self.device).eval()

    def record(self, name: str, **figures: object) -> None:
        self.file(f"{name}.json").write_text(json.dumps(figures))
        self.log(f"{name}: {json.dumps(figures)}")


def prepare(shop: Workshop) -> None:
    """Tokenizer and corpus."""
    shop.file("").mkdir(parents=True, exist_ok=True)
    stories = shop.stories()
    train = [story.text for story in stories if story.split == "train"]
    if shop.tokenizer_path is not None:
        tokenizer = Tokenizer.from_file(str(shop.tokenizer_path))
    else:
        tokenizer = train_tokenizer(train, shop.recipe.vocab_size)
    tokenizer.save(str(shop.file("tokenizer.json")))
    corpus = build_corpus(stories, tokenizer, shop.recipe.num_chats, seed=1)
    corpus.save(shop.file("corpus.safetensors"))
    shop.log(f"{len(train)} stories, {len(corpus.plain.ids)} tokens, {len(corpus.valid)} for validation")


def train_one(shop: Workshop, name: str) -> None:
    """Train one model of the recipe and save it; a teacher also writes its share of the pool, a draft is exported."""
    candidate, recipe = shop.recipe.find(name), shop.recipe
    corpus = Corpus.load(shop.file("corpus.safetensors"))
    started = time.monotonic()
    pool = pool_for(shop, candidate)
    model = train_model(candidate, corpus, pool, shop.device, shop.log)
    save_file(model.state_dict(), shop.file(f"{name}.safetensors"))
    score = validation_loss([model], corpus.valid, shop.device)
    score_1024 = validation_loss([model], corpus.valid, shop.device, window=min(1024, candidate.shape.max_tokens))
    shop.record(
        name,
        parameters=model.num_parameters(),
        nats_per_token=round(score.nats_per_token, 4),
        nats_per_token_1024=round(score_1024.nats_per_token, 4),
        bits_per_byte=round(score.bits_per_byte(corpus.valid_bytes), 4),
        seconds=round(time.monotonic() - started),
    )
    if candidate in recipe.teachers:
        half = model.to(torch.bfloat16) if shop.device.type == "cuda" else model
        documents = distill.write_stories(
            half, shop.tokenizer(), shop.train_stories(), recipe.pool, len(recipe.teachers), candidate.plan.seed
        )
        distill.save_documents(documents, shop.file(f"{name}-stories.safetensors"))
        shop.log(f"{name} wrote {len(documents)} stories, {time.monotonic() - started:.0f} s")


def pool_for(shop: Workshop, candidate: Candidate) -> Pool | None:
    """What a candidate learns from besides the text: nothing, the teachers' labels, or the shipped student's."""
    recipe = shop.recipe
    if candidate not in (*recipe.students, recipe.draft):
        return None
    pool = distill.load_pool(shop.file("pool.safetensors"), shop.device)
    if candidate == recipe.draft:  # what the draft must guess is the shipped model, not the teachers
        return distill.label(pool.windows, [shop.load_model(best_student(shop))], recipe.pool.top, shop.device)
    return pool


def make_pool(shop: Workshop) -> None:
    """Everything that the students read, labelled by the average of the teachers; the average is scored too."""
    recipe, started = shop.recipe, time.monotonic()
    corpus = Corpus.load(shop.file("corpus.safetensors"))
    teachers = [shop.load_model(candidate) for candidate in recipe.teachers]
    written = [shop.file(f"{candidate.name}-stories.safetensors") for candidate in recipe.teachers]
    plan = recipe.students[0].plan
    windows = distill.pool_windows(corpus, written, recipe.pool, plan.chat_share, plan.window)
    distill.save_pool(distill.label(windows, teachers, recipe.pool.top, shop.device), shop.file("pool.safetensors"))
    score = validation_loss(teachers, corpus.valid, shop.device)
    tokens, seconds = len(windows) * plan.window, round(time.monotonic() - started)
    shop.record(
        "ensemble",
        parameters=sum(teacher.num_parameters() for teacher in teachers),
        nats_per_token=round(score.nats_per_token, 4),
        bits_per_byte=round(score.bits_per_byte(corpus.valid_bytes), 4),
        pool_tokens=tokens,
        seconds=seconds,
    )


def best_student(shop: Workshop) -> Candidate:
    def loss(candidate: Candidate) -> float:
        return float(json.loads(shop.file(f"{candidate.name}.json").read_text())["nats_per_token"])

    return min(shop.recipe.students, key=loss)


def finish(shop: Workshop) -> None:
    """Export the best student and the draft; write and print the table."""
    recipe, tokenizer = shop.recipe, shop.tokenizer()
    corpus = Corpus.load(shop.file("corpus.safetensors"))
    student, draft = shop.load_model(best_student(shop)), shop.load_model(recipe.draft)
    export(student, tokenizer, shop.out / "stories")
    export(draft, tokenizer, shop.out / "stories-draft")
    agreement = greedy_agreement(student, draft, corpus.valid, shop.device)
    names = [c.name for c in (*recipe.comparisons, *recipe.teachers)] + ["ensemble"]
    names += [c.name for c in (*recipe.students, recipe.draft)]
    done = [name for name in names if shop.file(f"{name}.json").exists()]
    rows = {name: json.loads(shop.file(f"{name}.json").read_text()) for name in done}
    results = {"shipped": best_student(shop).name, "draft_greedy_agreement": round(agreement, 4), "models": rows}
    plans = {c.name: asdict(c) for c in (*recipe.comparisons, *recipe.teachers, *recipe.students, recipe.draft)}
    (shop.out / "results.json").write_text(json.dumps(results | {"recipe": plans}, indent=1) + "\n")
    for name, row in rows.items():
        figures = f"{row['nats_per_token']:.4f} nats a token  {row['bits_per_byte']:.4f} bits a byte"
        shop.log(f"{name:24} {row['parameters'] / 1e6:6.1f} M  {figures}")
    shop.log(f"shipped: {results['shipped']}; the draft agrees with it on {agreement:.1%} of held-out tokens")


def train_all(shop: Workshop, names: Sequence[str], arguments: Sequence[str]) -> None:
    """Train the named models, `jobs` at a time, each in a process of its own; one at a time stays in this one."""
    if shop.jobs == 1:
        for name in names:
            train_one(shop, name)
        return
    waiting, running = list(names), dict[str, subprocess.Popen[bytes]]()
    while waiting or running:
        while waiting and len(running) < shop.jobs:
            name = waiting.pop(0)
            command = [sys.executable, "-m", "training.train", *arguments, "--only", name]
            running[name] = subprocess.Popen(command)
        time.sleep(0.2)
        for name, process in list(running.items()):
            if (code := process.poll()) is not None:
                if code != 0:
                    raise RuntimeError(f"training {name} failed with exit code {code}")
                del running[name]


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="training.train", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--text", type=Path, required=True, help="Folder that holds tinystories/.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for the results.")
    parser.add_argument("--smoke", action="store_true", help="A tiny recipe that only proves that the code runs.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=1, help="Models trained at once.")
    parser.add_argument("--tokenizer", type=Path, help="Use this tokenizer.json instead of training one.")
    parser.add_argument("--compare", action="store_true", help="Also train the comparisons of the recipe.")
    parser.add_argument("--only", help="Train only this model, from an OUT that is prepared; used by --jobs.")
    options = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("high")
    device = torch.device(options.device)
    shop = Workshop(options.text, options.out, options.smoke, device, options.jobs, options.tokenizer)
    if options.only:
        train_one(shop, options.only)
        return
    recipe = shop.recipe
    prepare(shop)
    if options.compare:
        train_all(shop, [candidate.name for candidate in recipe.comparisons], arguments)
    train_all(shop, [candidate.name for candidate in recipe.teachers], arguments)
    make_pool(shop)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    train_all(shop, [candidate.name for candidate in recipe.students], arguments)
    train_all(shop, [recipe.draft.name], arguments)
    finish(shop)


if __name__ == "__main__":
    main()
