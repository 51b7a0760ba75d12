"""``mini-vllm serve``: an engine process, an HTTP server in front of it, and an exit code that says why it ended."""

import asyncio
import gc
import logging
import resource
import signal
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from minivllm.cli.options import ALL_SECTIONS, Parser, add_config, add_model_argument, read_config
from minivllm.config import Config
from minivllm.errors import InvalidOption
from minivllm.logs import set_up_logging

if TYPE_CHECKING:
    from minivllm.observe.otlp import SpanExporter


def run(argv: Sequence[str]) -> int:
    """Serve until a signal comes; 0 only for a wanted stop."""
    parser = Parser("serve", "Serve a model over HTTP: a native API and the OpenAI-compatible one.", "[MODEL] [options]")
    add_model_argument(parser)
    add_config(parser, ALL_SECTIONS)
    config = read_config(parser.read(argv))
    set_up_logging(config.server.log_level, config.server.log_format, "server")
    from minivllm.server.keys import check_exposure

    check_exposure(config.server)
    raise_open_files_limit()
    check_port(config.server.host, config.server.port)
    if config.server.metrics_port is not None:
        check_port(config.server.metrics_host, config.server.metrics_port)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_serve(config))


async def _serve(config: Config) -> int:
    """Load the model, serve it, and end the engine afterwards."""
    from minivllm.cli.start import memory_table, start_llm
    from minivllm.door import locate, sampling_defaults

    config, folder = locate(config)
    defaults = sampling_defaults(config, folder)
    spans = _span_exporter(config)
    llm = await start_llm(config, folder, _import_server)
    if spans is not None and llm.explanations is not None:
        llm.explanations.on_delivered = spans.tell
    try:
        from minivllm.server.application import create_app
        from minivllm.server.http import Server, serve

        def announce(server: Server) -> None:
            names = ", ".join(config.served_names)
            if defaults:
                print("Sampling defaults of /v1: " + ", ".join(f"{name} {value}" for name, value in defaults.items()))
            if server.metrics is not None:
                print(f"/metrics is on {server.metrics.url}")
            print(f"{memory_table(llm.info)}\nServing {names} on {server.url} (Ctrl-C stops)", flush=True)

        app = create_app(llm, config, defaults)
        spare_the_collector()
        return await serve(app, config, llm, announce)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):  # it ends already: one more must not change the exit code
            signal.signal(number, signal.SIG_IGN)
        await llm.close()
        if spans is not None:
            await asyncio.to_thread(spans.close)


def _span_exporter(config: Config) -> "SpanExporter | None":
    """Who sends spans of requests, if somebody is to. Raises ``InvalidOption``."""
    endpoint = config.observe.otlp_traces_endpoint
    if endpoint is None:
        return None
    if not config.observe.step_records:
        raise InvalidOption("--otlp-traces-endpoint reads the records of steps; leave out --step-records 0, or it.")
    from minivllm.observe.otlp import span_exporter

    return span_exporter(endpoint)


def _import_server() -> None:
    """Import the HTTP side while the engine process loads."""
    import minivllm.server.application
    import minivllm.server.http  # noqa: F401


def loop_factory() -> Callable[[], Any] | None:
    """uvloop's event loop where it is installed (not on Windows): about twice as many streamed events per second."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def spare_the_collector() -> None:
    """Let the garbage collector leave alone what is there now and stays: the vocabulary, the code. Looking through it again and
    again would stop the event loop, and so every stream, for a quarter of a second at a time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(2000, 10, 100)


def raise_open_files_limit() -> None:
    """Let the process open as many files as it may: the usual soft limit of 1024 is 1000 streams."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as error:  # some systems' hard limit is more than they allow
            logging.getLogger("minivllm").warning("open files stay limited to %d (%s)", soft, error)


def check_port(host: str, port: int) -> None:
    """Raise ``PortInUse`` now rather than after the model is loaded, if the address cannot be listened on."""
    from minivllm.server.listen import bind

    for sock in bind(host, port):
        sock.close()
