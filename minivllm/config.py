"""Every option, declared once: name, type, default, help, bounds.

A field of these frozen dataclasses *is* the option: ``--max-num-seqs`` on the command line, ``MINIVLLM_MAX_NUM_SEQS`` in the
environment, a row of the README's table and a key of ``/config`` are reflected from it (``cli/options.py``). Names and defaults
follow vLLM's where it has the option, so that commands carry over. Nothing else in the package reads the environment.

What the user wrote stays in ``Config``. What follows from it, the machine and the model is settled once when the engine
starts (``runner/sizing.py``) and told as ``types.EngineInfo``.
"""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from minivllm.errors import InvalidOption

BUNDLED_MODEL = Path(__file__).parent / "assets" / "stories"


@dataclass(frozen=True)
class Opt:
    """What the command line, the environment and the docs say of a field. ``common`` ones are shown by plain ``--help``."""

    help: str
    low: float | None = None
    high: float | None = None
    common: bool = True
    flags: tuple[str, ...] = ()  # further names on the command line
    repeat: bool = False  # of a tuple: the option is given once for each item, so that it takes no word after its own


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and in what form."""

    model: Annotated[str, Opt("Folder or hub name of the model; none: the bundled story model.")] = str(BUNDLED_MODEL)
    served_model_name: Annotated[tuple[str, ...], Opt("Names under which clients ask for the model.")] = ()
    tokenizer: Annotated[str | None, Opt("Folder or hub name of the tokenizer, if not the model's.", common=False)] = None
    revision: Annotated[str | None, Opt("Branch, tag or commit of the hub model.", common=False)] = None
    download_dir: Annotated[str | None, Opt("Where hub models are kept; none: the hub library's cache.", common=False)] = None
    load_format: Annotated[Literal["auto", "safetensors", "dummy"], Opt("dummy: random weights, for measuring.")] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], Opt("Precision of weights and activations.")
    ] = "auto"
    quantization: Annotated[
        Literal["none", "int8"], Opt("How weights are stored. int8: rounded while they are loaded (w8a8).", flags=("-q",))
    ] = "none"
    max_model_len: Annotated[
        int | None, Opt("Longest prompt plus output, in tokens; none: the model's, or what the cache holds.", low=1)
    ] = None
    chat_template: Annotated[str | None, Opt("File with a chat template to use instead of the model's.", common=False)] = None
    tool_call_parser: Annotated[
        str,
        Opt("How the model writes calls of tools (hermes, llama3_json, mistral, qwen3_coder, qwen3_xml, deepseek_v3, pythonic, "
            "openai); auto: as its chat template does.", common=False),
    ] = "auto"
    reasoning_parser: Annotated[
        str, Opt("How the model writes its reasoning (qwen3, deepseek_r1, openai_gptoss); empty: as plain text.", common=False)
    ] = ""
    max_logprobs: Annotated[
        int, Opt("Likeliest tokens that a request may ask for at each position.", low=0, high=20, common=False)
    ] = 20
    generation_config: Annotated[
        str,
        Opt("Whose sampling defaults /v1 requests get: auto (the model's), vllm (none), or a folder's.", common=False),
    ] = "auto"
    override_generation_config: Annotated[
        str | None, Opt("JSON object of sampling defaults that beat those of --generation-config.", common=False)
    ] = None
    seed: Annotated[int, Opt("Seed of dummy weights and of requests' drawn seeds; requests may bring their own.", low=0)] = 0


@dataclass(frozen=True)
class CacheConfig:
    """The paged KV cache."""

    block_size: Annotated[int, Opt("Tokens per KV block.", low=1, high=1024)] = 16
    kv_cache_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], Opt("Precision of the KV cache; auto: the model's.")
    ] = "auto"
    kv_cache_memory_bytes: Annotated[
        int | None, Opt("Memory for the KV cache on its device, CPU included (1k = 1000, 1K = 1024, also M and G).", low=1)
    ] = None
    num_gpu_blocks_override: Annotated[
        int | None, Opt("Number of KV blocks, instead of sizing them from memory; on any device.", low=2, common=False)
    ] = None
    gpu_memory_utilization: Annotated[
        float | None,
        Opt("Share of the device's memory for weights, cache and workspace; none: 0.9 on a GPU, 0.4 of what is free on a CPU.",
            low=0.01, high=1.0),
    ] = None
    enable_prefix_caching: Annotated[bool, Opt("Reuse the KV blocks of equal prompt beginnings.")] = True


@dataclass(frozen=True)
class SchedulerConfig:
    """Who runs in a step."""

    max_num_seqs: Annotated[int, Opt("Most sequences in one step.", low=1, high=65536)] = 128
    max_num_batched_tokens: Annotated[int, Opt("Most tokens in one step; longer prompts run in chunks.", low=1)] = 2048
    batching_policy: Annotated[
        Literal["mixed", "prefill-first", "separate"],
        Opt("mixed: decodes, then prompt chunks; prefill-first: the other way round; separate: never both in a step."),
    ] = "mixed"
    scheduling_policy: Annotated[
        Literal["fcfs", "priority"], Opt("Order of the queue and who gives way: by arrival, or by the request's priority.")
    ] = "fcfs"
    async_scheduling: Annotated[
        bool | None, Opt("Plan a step while the one before runs; none: where the device gains from it.", common=False)
    ] = None


@dataclass(frozen=True)
class RunnerConfig:
    """How a step is computed."""

    device: Annotated[Literal["auto", "cpu", "cuda"], Opt("Where the model runs.")] = "auto"
    num_threads: Annotated[int | None, Opt("CPU threads of the model; none: one per core.", low=1)] = None
    cpu_kernels: Annotated[
        Literal["auto", "native", "torch"],
        Opt("On a CPU: native ones compiled for this machine, or torch's; auto: native where a compiler is found."),
    ] = "auto"
    gpu_kernels: Annotated[
        Literal["auto", "triton", "torch"],
        Opt("On a GPU: Triton's, or torch's alone; auto: Triton where it is installed. triton with --device cpu needs "
            "TRITON_INTERPRET=1 and runs the GPU's kernels as Python, to look into them.", common=False),
    ] = "auto"
    num_grammar_workers: Annotated[
        int | None,
        Opt("Processes that follow grammars; 0: the engine does; none: by the cores, on a GPU.", low=0, high=256, common=False),
    ] = None
    enforce_eager: Annotated[bool, Opt("On a GPU: launch every kernel by itself, and capture no graphs.", common=False)] = False
    batch_invariant: Annotated[
        bool, Opt("Logits bitwise the same whatever else is in the batch; costs speed, but nothing with native CPU kernels.")
    ] = False
    tensor_parallel_size: Annotated[int, Opt("Devices that share the model.", low=1, high=1, flags=("-tp",), common=False)] = 1


@dataclass(frozen=True)
class ServerConfig:
    """The HTTP side."""

    host: Annotated[str, Opt("Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Opt("Port to listen on; 0: any free one.", low=0, high=65535)] = 8000
    api_key: Annotated[
        tuple[str, ...],
        Opt("Key that clients must send as a bearer token; several: with commas, or the option again. Other users of the "
            "machine can read a command line: MINIVLLM_API_KEY or a file is better.", repeat=True),
    ] = field(default=(), repr=False)
    api_key_file: Annotated[str | None, Opt("File of keys, a tenant's name and a key on each line.")] = None
    metrics_port: Annotated[
        int | None, Opt("Serve /metrics on this port alone, without keys; none: on --port, like any route.", low=0, high=65535)
    ] = None
    metrics_host: Annotated[str, Opt("Address that --metrics-port is on.", common=False)] = "127.0.0.1"
    max_body_bytes: Annotated[int, Opt("Longest request body.", low=1024, common=False)] = 8 * 2**20
    max_header_bytes: Annotated[int, Opt("Longest request line plus headers.", low=1024, common=False)] = 64 * 2**10
    header_timeout_s: Annotated[float, Opt("Time for a client to send its headers.", low=0.1, common=False)] = 10.0
    body_timeout_s: Annotated[float, Opt("Time for a client to send its body.", low=0.1, common=False)] = 60.0
    keep_alive_timeout_s: Annotated[float, Opt("Time an idle connection is kept.", low=0.1, common=False)] = 5.0
    write_timeout_s: Annotated[
        float, Opt("Time a client may leave its reply unread before the connection is closed.", low=0.1, common=False)
    ] = 300.0
    max_waiting_requests: Annotated[int, Opt("Requests taken in at once; more are answered 503.", low=1)] = 4096
    max_engine_restarts: Annotated[
        int, Opt("Times in ten minutes that a dead or silent engine is replaced; then the server ends.", low=0, common=False)
    ] = 20
    slow_reader_pause_s: Annotated[
        float,
        Opt("Time a client may leave its reply unread before its request gives up its memory until it reads again.", low=0.01,
            flags=("--slow-reader-pause",), common=False),
    ] = 5.0
    max_connections: Annotated[
        int | None, Opt("Connections at once; more get 503. None: what the limit of open files allows.", low=1, common=False)
    ] = None
    max_num_queued_reqs: Annotated[
        int, Opt("Requests that may wait beside the --max-num-seqs that run; more are answered 503.", low=0)
    ] = 4096
    max_num_queued_tokens: Annotated[
        int, Opt("Tokens, of prompts and of most output, that may wait beside those that the cache holds; more get 503.", low=0)
    ] = 2**26
    max_requests_per_key: Annotated[
        int | None, Opt("Requests that each API key may have open at once; more are answered 429.", low=1, common=False)
    ] = None
    max_tokens_per_minute_per_key: Annotated[
        int | None, Opt("Tokens that each API key may use in a minute; more are answered 429.", low=1, common=False)
    ] = None
    queue_timeout_s: Annotated[
        float | None,
        Opt("Time for a request's first token to come, else it gets 503.", low=0.01, flags=("--queue-timeout",), common=False),
    ] = None
    request_timeout_s: Annotated[
        float | None,
        Opt("Time after which a request is ended with an error.", low=0.01, flags=("--request-timeout",), common=False),
    ] = None
    shutdown_timeout_s: Annotated[
        float, Opt("After SIGTERM, time for running requests to finish.", low=0.0, flags=("--shutdown-timeout",))
    ] = 30.0
    enable_prompt_tokens_details: Annotated[
        bool, Opt("Say in the usage how many prompt tokens were found in the cache.", common=False)
    ] = False
    metrics_prefix: Annotated[str, Opt("Prefix of the Prometheus names.", common=False)] = "vllm:"
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Opt("How much is logged.")] = "info"
    log_format: Annotated[
        Literal["text", "json"], Opt("How a record is written, which is one line in any case.", common=False)
    ] = "text"
    access_log: Annotated[bool, Opt("Log one line per HTTP request.", common=False)] = False


@dataclass(frozen=True)
class ObserveConfig:
    """What is kept of the steps, for those who want to see them."""

    step_records: Annotated[
        int, Opt("Records of steps that GET /steps has; 0: none, and no explanations.", low=0, high=10**6)
    ] = 4096
    record_tokens: Annotated[
        bool | None,
        Opt("Tell tokens in records of steps, to all who may read them; none: where there are no API keys.", common=False),
    ] = None
    record_steps: Annotated[str | None, Opt("File to write the records of all steps into, compressed.")] = None
    otlp_traces_endpoint: Annotated[
        str | None,
        Opt("Send a span for each request, and one for each of its phases, to this OpenTelemetry collector (OTLP over HTTP, as "
            "http://127.0.0.1:4318/v1/traces). The one thing for which the server calls anybody. Needs mini-vllm[otlp].",
            common=False),
    ] = None


@dataclass(frozen=True)
class Config:
    """All options of the engine and the server."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    runner: RunnerConfig = field(default_factory=RunnerConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)

    @property
    def tells_tokens(self) -> bool:
        """Whether records of steps tell tokens. With keys, those who have one are not to read each other's prompts unasked."""
        wanted, server = self.observe.record_tokens, self.server
        read = self.observe.step_records > 0 or self.observe.record_steps is not None
        return read and (not (server.api_key or server.api_key_file) if wanted is None else wanted)

    @property
    def without_keys(self) -> "Config":
        """The same for processes that have no use for the clients' keys."""
        server = dataclasses.replace(self.server, api_key=(), api_key_file=None)
        observe = dataclasses.replace(self.observe, record_tokens=self.tells_tokens)
        return dataclasses.replace(self, server=server, observe=observe)

    @property
    def served_names(self) -> tuple[str, ...]:
        """Names that clients may ask for; the first is the one answered with."""
        if self.model.served_model_name:
            return self.model.served_model_name
        return ("stories",) if self.model.model == str(BUNDLED_MODEL) else (self.model.model,)


@dataclass(frozen=True)
class Option:
    """One field of one section, as the reflection sees it."""

    section: str
    name: str
    type: Any  # without Annotated
    default: Any
    opt: Opt

    @property
    def flag(self) -> str:
        """The name on the command line."""
        return "--" + self.name.replace("_", "-")

    def check(self, value: Any) -> None:
        """Raise ``InvalidOption`` when the value is outside its bounds or choices."""
        choices = [c for c in get_args(self.type) if isinstance(c, str)] if get_origin(self.type) is Literal else []
        if choices and value not in choices:
            raise InvalidOption(f"{self.flag} must be one of {', '.join(choices)}, got {value!r}.")
        if isinstance(value, int | float) and not isinstance(value, bool):
            low, high = self.opt.low, self.opt.high
            if value != value or (low is not None and value < low) or (high is not None and value > high):
                span = f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"
                raise InvalidOption(f"{self.flag} must be {span}, got {value}.")


def _sections() -> dict[str, type[Any]]:
    """The dataclasses of ``Config`` by their field's name."""
    return dict(get_type_hints(Config).items())


def options() -> tuple[Option, ...]:
    """Every option in the order of declaration."""
    found: list[Option] = []
    for section, cls in _sections().items():
        hints = get_type_hints(cls, include_extras=True)
        for f in dataclasses.fields(cls):
            base, opt = get_args(hints[f.name])[:2]
            found.append(Option(section, f.name, base, f.default, opt))
    return tuple(found)


def make_config(**values: Any) -> Config:
    """Build a ``Config`` from flat option names; raises ``InvalidOption`` for an unknown name or a bad value."""
    known = {o.name: o for o in options()}
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name not in known:
            raise InvalidOption(f"There is no option {name!r}; `mini-vllm serve --help=all` lists them.")
        option = known[name]
        if value is not None or option.default is None:
            if value is not None:
                option.check(value)
            sections.setdefault(option.section, {})[name] = value
    return Config(**{name: cls(**sections.get(name, {})) for name, cls in _sections().items()})


def environment_with(more: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child process: ours, and what its libraries are to be told beside."""
    return {**os.environ, **more}


def environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Option values given as ``MINIVLLM_<NAME>``, still as text. The only reader of the environment."""
    source = os.environ if environ is None else environ
    names = {o.name for o in options()}
    return {n: source[key] for n in names if (key := "MINIVLLM_" + n.upper()) in source}
