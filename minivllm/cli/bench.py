"""``mini-vllm bench throughput|latency|serve``: options of the measuring tools in ``minivllm.bench``.

Option names, printed wording and JSON keys are those of vLLM's benchmarks, so that scripts and figures can be compared.
"""

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Final

from minivllm.bench.workload import Item, RandomShape, custom_items, random_items
from minivllm.cli.generate import token_bar
from minivllm.cli.options import Parser, add_config, add_sampling, as_json, read_config, read_sampling
from minivllm.cli.start import load_llm
from minivllm.config import BUNDLED_MODEL
from minivllm.errors import InvalidOption, ModelNotFound

USAGE: Final = """usage: mini-vllm bench KIND [options]

kinds:
  throughput  how many requests and tokens per second a model completes offline
  latency     how long one batch takes
  serve       load on a running server: throughput, TTFT, TPOT, ITL

mini-vllm bench KIND --help shows the options."""
DEFAULT_INPUT_LEN: Final = 1024  # shortened, and said so, where the model's context is smaller
DEFAULT_OUTPUT_LEN: Final = 128


def run(argv: Sequence[str]) -> int:
    """Run one kind of benchmark."""
    kinds = {"throughput": run_throughput, "latency": run_latency, "serve": run_serve}
    if not argv or argv[0] in ("-h", "--help", "--help=all"):
        sys.stdout.write(USAGE + "\n")
        return 0 if argv else 2
    if argv[0] not in kinds:
        raise InvalidOption(f"There is no benchmark {argv[0]!r}; there are {', '.join(kinds)}.")
    return kinds[argv[0]](argv[1:])


def _count(text: str, low: int = 1) -> int:
    """A whole number of at least ``low``."""
    if not text.isascii() or not text.isdigit() or int(text) < low:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low}")
    return int(text)


def _count0(text: str) -> int:
    """A whole number, 0 included."""
    return _count(text, 0)


def _positive(text: str) -> float:
    """A number over 0; inf is one."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number over 0")
    return value


def _ratio(text: str) -> float:
    """A number from 0 up to, not including, 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not at least 0 and under 1")
    return value


# ----------------------------------------------------------------------------------------------------------------------
# The workload's options, shared by the kinds
# ----------------------------------------------------------------------------------------------------------------------


def _add_workload(parser: Parser, num_prompts: int) -> None:
    """Add the options that choose prompts and lengths."""
    group = parser.add_argument_group("workload")
    group.add_argument("--dataset-name", choices=("random", "custom"), default="random", help="[random]")
    group.add_argument("--dataset-path", metavar="FILE", help='for custom: {"prompt": ..., "max_tokens": optional} a line')
    group.add_argument("--num-prompts", type=_count, default=num_prompts, metavar="N", help=f"[{num_prompts}]")
    group.add_argument("--random-input-len", "--input-len", type=_count, metavar="N", help=f"tokens [{DEFAULT_INPUT_LEN}]")
    group.add_argument("--random-output-len", "--output-len", type=_count, metavar="N", help=f"tokens [{DEFAULT_OUTPUT_LEN}]")
    group.add_argument("--random-range-ratio", type=_ratio, default=0.0, metavar="R", help="lengths vary by this share [0]")
    group.add_argument("--random-prefix-len", type=_count0, default=0, metavar="N", help="tokens all prompts begin with [0]")


def _shape(found: argparse.Namespace, max_model_len: int | None) -> RandomShape:
    """Lengths of the random workload; the default input length gives way to a small context, a chosen one never."""
    output_len = found.random_output_len or DEFAULT_OUTPUT_LEN
    ratio, prefix = found.random_range_ratio, found.random_prefix_len
    if found.random_input_len is None and max_model_len is not None:
        room = int((max_model_len - prefix - int(output_len * (1 + ratio))) / (1 + ratio))
        input_len = min(DEFAULT_INPUT_LEN, max(room, 1))
        if input_len < DEFAULT_INPUT_LEN:
            sys.stderr.write(f"Prompts have {input_len} tokens: the usual {DEFAULT_INPUT_LEN} do not fit this context.\n")
    else:
        input_len = found.random_input_len or DEFAULT_INPUT_LEN
    shape = RandomShape(input_len, output_len, ratio, prefix)
    if max_model_len is not None and shape.longest > max_model_len:
        raise InvalidOption(
            f"Prompts and outputs of up to {shape.longest} tokens do not fit the model's context of {max_model_len}; "
            "lower --random-input-len or --random-output-len."
        )
    return shape


def _items(
    found: argparse.Namespace, max_model_len: int | None, vocabulary: Callable[[], tuple[int, Collection[int]]], seed: int
) -> list[Item]:
    """Draw or read the workload."""
    if found.dataset_name == "custom":
        if not found.dataset_path:
            raise InvalidOption("--dataset-name custom needs --dataset-path FILE.")
        return custom_items(Path(found.dataset_path), found.num_prompts, found.random_output_len or 256)
    if found.dataset_path:
        raise InvalidOption("--dataset-path is read with --dataset-name custom only.")
    shape = _shape(found, max_model_len)
    vocab_size, special_ids = vocabulary()
    return random_items(shape, found.num_prompts, vocab_size, special_ids, seed)


def _write_json(path: str | Path | None, result: Any) -> None:
    """Write a result file if one is wanted."""
    if path is not None:
        try:
            Path(path).write_text(json.dumps(result, indent=4) + "\n", encoding="utf-8")
        except OSError as error:
            raise InvalidOption(f"The result file {path} cannot be written ({error.strerror}).") from None


# ----------------------------------------------------------------------------------------------------------------------
# Offline kinds
# ----------------------------------------------------------------------------------------------------------------------


def run_throughput(argv: Sequence[str]) -> int:
    """Complete a whole workload offline and print its rate."""
    from minivllm.bench.offline import throughput
    from minivllm.bench.report import throughput_text

    parser = Parser("bench throughput", "How much a model completes per second, offline.")
    _add_workload(parser, num_prompts=1000)
    parser.add_argument("--output-json", metavar="FILE", help="write the result here too")
    add_sampling(parser, leave_out=frozenset({"seed", "n", "logprobs"}))
    add_config(parser)
    found = parser.read(argv)
    config = read_config(found)
    llm = load_llm(config)
    try:
        tokenizer = llm.tokenizer
        items = _items(
            found, llm.info.max_model_len, lambda: (tokenizer.vocab_size, tokenizer.special_ids), config.model.seed
        )
        with token_bar(sum(i.max_tokens for i in items)) as progress:
            result, num_prompt, num_output = throughput(llm, items, read_sampling(found), progress)
    finally:
        llm.close()
    sys.stdout.write(throughput_text(result, num_prompt, num_output) + "\n")
    _write_json(found.output_json, result)
    return 0


def run_latency(argv: Sequence[str]) -> int:
    """Time one batch, again and again."""
    from minivllm.bench.offline import latency
    from minivllm.bench.report import latency_text

    parser = Parser("bench latency", "How long one batch takes, offline.")
    group = parser.add_argument_group("workload")
    for flag, default, what in (
        ("--input-len", 32, "prompt tokens"),
        ("--output-len", 128, "output tokens"),
        ("--batch-size", 8, "prompts at once"),
        ("--num-iters", 30, "timed runs"),
    ):
        group.add_argument(flag, type=_count, default=default, metavar="N", help=f"{what} [{default}]")
    group.add_argument("--num-iters-warmup", type=_count0, default=10, metavar="N", help="runs before those [10]")
    parser.add_argument("--output-json", metavar="FILE", help="write the result here too")
    add_sampling(parser, leave_out=frozenset({"seed", "n", "logprobs"}))
    add_config(parser)
    found = parser.read(argv)
    config = read_config(found)
    llm = load_llm(config)
    try:
        shape, tokenizer = RandomShape(found.input_len, found.output_len), llm.tokenizer
        if shape.longest > llm.info.max_model_len:
            raise InvalidOption(f"--input-len plus --output-len exceed the model's context of {llm.info.max_model_len} tokens.")

        def draw(i: int) -> list[Item]:
            return random_items(shape, found.batch_size, tokenizer.vocab_size, tokenizer.special_ids, config.model.seed + i)

        result = latency(llm, draw, read_sampling(found), found.num_iters_warmup, found.num_iters)
    finally:
        llm.close()
    sys.stdout.write(latency_text(result) + "\n")
    _write_json(found.output_json, result)
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# Load on a server
# ----------------------------------------------------------------------------------------------------------------------


def _serve_parser() -> Parser:
    """The options of ``bench serve``."""
    parser = Parser("bench serve", "Load on a running OpenAI-compatible server.")
    target = parser.add_argument_group("server")
    target.add_argument("--base-url", metavar="URL", help="instead of --host and --port")
    target.add_argument("--host", default="127.0.0.1", help="[127.0.0.1]")
    target.add_argument("--port", type=_count, default=8000, help="[8000]")
    target.add_argument("--endpoint", default="/v1/completions", metavar="PATH", help="[/v1/completions]")
    target.add_argument("--header", nargs="+", default=[], metavar="KEY=VALUE", help="further request headers")
    target.add_argument("--model", help="name to ask for; none: the first that the server lists")
    target.add_argument("--tokenizer", help="folder or hub name, for random prompts; none: the model's own")
    _add_workload(parser, num_prompts=1000)
    pace = parser.add_argument_group("pace")
    pace.add_argument("--request-rate", type=_positive, default=math.inf, metavar="RPS", help="[inf: all at once]")
    pace.add_argument("--burstiness", type=_positive, default=1.0, metavar="X", help="1: Poisson, under 1: in bursts [1]")
    pace.add_argument("--max-concurrency", type=_count, metavar="N", help="most requests at one time")
    pace.add_argument("--num-warmups", type=_count0, default=0, metavar="N", help="requests before the clock starts [0]")
    pace.add_argument("--ready-check-timeout-sec", type=_count0, default=0, metavar="S", help="wait so long for the server [0]")
    pace.add_argument("--seed", type=_count0, default=0, help="of workload and arrivals [0]")
    add_sampling(parser, leave_out=frozenset({"seed", "n", "logprobs", "max_tokens"}))
    report = parser.add_argument_group("report")
    report.add_argument("--percentile-metrics", default="ttft,tpot,itl", metavar="NAMES", help="of ttft,tpot,itl,e2el")
    report.add_argument("--metric-percentiles", default="99", metavar="P,...", help="[99]")
    report.add_argument("--goodput", nargs="+", default=[], metavar="NAME:MS", help="limits of a good answer: ttft, tpot, e2el")
    report.add_argument("--save-result", action="store_true", help="write a JSON result file")
    report.add_argument("--save-detailed", action="store_true", help="with every request's values")
    report.add_argument("--result-dir", default=".", metavar="DIR", help="[.]")
    report.add_argument("--result-filename", metavar="NAME", help="none: made of the time")
    return parser


def run_serve(argv: Sequence[str]) -> int:
    """Load a server and print what its clients saw; 1 when no request came through."""
    from minivllm.bench.load import Pace
    from minivllm.bench.report import serving_details, serving_result, serving_text
    from minivllm.cli.serve import loop_factory

    found = _serve_parser().read(argv)
    wanted = _wanted(found)
    pace = Pace(found.request_rate, found.burstiness, found.max_concurrency, found.seed)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:  # the client must cost less than the server it measures
        outcomes, duration_s = runner.run(_load(found, pace))
    result = serving_result(outcomes, duration_s, wanted)
    sys.stdout.write(serving_text(result, pace, wanted) + "\n")
    if first := next((o.error for o in outcomes if o.error), None):
        sys.stderr.write(f"First failure: {first}\n")
    if found.save_result or found.save_detailed:
        name = found.result_filename or time.strftime("bench-serve-%Y%m%d-%H%M%S.json")
        details = serving_details(outcomes) if found.save_detailed else {}
        rate = "inf" if math.isinf(pace.request_rate) else pace.request_rate
        settings = {"num_prompts": len(outcomes), "request_rate": rate, "burstiness": pace.burstiness}
        _write_json(Path(found.result_dir) / name, {**settings, "max_concurrency": pace.max_concurrency, **result, **details})
    return 0 if result["completed"] else 1


def _wanted(found: argparse.Namespace) -> Any:
    """Which metrics, percentiles and limits the call asks for."""
    from minivllm.bench.report import METRICS, ServingWanted

    metrics = tuple(found.percentile_metrics.split(","))
    if unknown := [m for m in metrics if m not in METRICS]:
        raise InvalidOption(f"--percentile-metrics: there is no {unknown[0]!r}; there are {', '.join(METRICS)}.")
    try:
        percentiles = tuple(float(p) for p in found.metric_percentiles.split(","))
        limits = {name: float(limit) for name, limit in (g.split(":") for g in found.goodput)}
    except ValueError:
        raise InvalidOption("--metric-percentiles is written 50,99 and --goodput ttft:200 tpot:50.") from None
    if not all(0 <= p <= 100 for p in percentiles) or not set(limits) <= {"ttft", "tpot", "e2el"}:
        raise InvalidOption("Percentiles are from 0 to 100, and --goodput takes ttft, tpot and e2el.")
    return ServingWanted(metrics, percentiles, limits)


async def _load(found: argparse.Namespace, pace: Any) -> tuple[list[Any], float]:
    """Ask the server what it serves, make the workload and run it."""
    from minivllm.bench.load import Pace, Target, run_load

    base = (found.base_url or f"http://{found.host}:{found.port}").rstrip("/")
    try:
        headers = dict(h.split("=", 1) for h in found.header)
    except ValueError:
        raise InvalidOption("--header is written KEY=VALUE.") from None
    card = await _model_card(base, found.model, headers, found.ready_check_timeout_sec)
    fields = as_json(read_sampling(found))
    if found.dataset_name == "random":
        fields.setdefault("ignore_eos", True)  # random prompts are for lengths, so outputs have the length asked for
    target = Target(base + found.endpoint, found.model or card["id"], fields, headers)
    items = _items(found, card.get("max_model_len"), lambda: _vocabulary(found.tokenizer, card), found.seed)
    await run_load(target, items[: found.num_warmups], Pace(max_concurrency=pace.max_concurrency))
    with token_bar(sum(i.max_tokens for i in items)) as progress:
        return await run_load(target, items, pace, None if progress is None else lambda done: progress(done.num_output))


async def _model_card(base: str, name: str | None, headers: dict[str, str], wait_s: float) -> dict[str, Any]:
    """The entry of ``/v1/models`` that is measured; waits up to ``wait_s`` for a server that is still starting."""
    from minivllm.bench.client import RequestFailed, fetch_json

    until = time.monotonic() + wait_s
    while True:
        try:
            listing = await fetch_json(f"{base}/v1/models", headers=headers)
            break
        except RequestFailed:
            if time.monotonic() >= until:
                raise
            await asyncio.sleep(0.2)
    cards: list[dict[str, Any]] = listing["data"]
    chosen = [c for c in cards if name in (None, c["id"])]
    if not chosen:
        raise InvalidOption(f"The server does not serve {name!r}; it serves {', '.join(c['id'] for c in cards)}.")
    return chosen[0]


def _vocabulary(tokenizer: str | None, card: dict[str, Any]) -> tuple[int, Collection[int]]:
    """Size of the model's vocabulary and its special ids, from its tokenizer."""
    from minivllm.models.hub import fetch_model
    from minivllm.text.tokenizer import load_tokenizer

    name = tokenizer or card.get("root") or card["id"]
    if tokenizer is None and (bundled := BUNDLED_MODEL.parent / name).is_dir():
        name = str(bundled)
    try:
        loaded = load_tokenizer(fetch_model(name, None, None, weights=False))
    except ModelNotFound as error:
        raise InvalidOption(f"Random prompts need the model's tokenizer; name it with --tokenizer ({error})") from None
    return loaded.vocab_size, loaded.special_ids
