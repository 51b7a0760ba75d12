"""What is refused at start where spans are asked for."""

import builtins
from typing import Any

import pytest

from minivllm.cli.main import main
from minivllm.errors import InvalidOption
from minivllm.observe.otlp import span_exporter


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4318", "grpc://127.0.0.1:4317", ""])
def test_an_address_that_is_none_is_refused(endpoint: str) -> None:
    with pytest.raises(InvalidOption, match="4318/v1/traces"):
        span_exporter(endpoint)


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InvalidOption, match=r"pip install 'mini-vllm\[otlp\]'"):
        span_exporter("http://127.0.0.1:4318/v1/traces")


def test_spans_need_records(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["serve", "--port", "0", "--otlp-traces-endpoint", "http://127.0.0.1:4318/v1/traces", "--step-records", "0"]
    assert main(argv) == 2
    assert "--step-records 0" in capsys.readouterr().err
