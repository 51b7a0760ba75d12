"""Options: reflected from their declarations, forgiving in form, strict in content."""

from pathlib import Path

import pytest

from minivllm.cli.options import (
    ALL_SECTIONS,
    Parser,
    add_config,
    add_sampling,
    as_json,
    flat_options,
    help_topic,
    markdown,
    normalise,
    parse_size,
    read_config,
    read_sampling,
)
from minivllm.config import Config, make_config, options
from minivllm.errors import InvalidOption
from minivllm.types import SETTLED, Grammar, SamplingParams


@pytest.fixture
def parser() -> Parser:
    parser = Parser("serve", "Serve.")
    add_config(parser, ALL_SECTIONS)
    return parser


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for option in options():
        monkeypatch.delenv("MINIVLLM_" + option.name.upper(), raising=False)


def read(parser: Parser, *argv: str) -> Config:
    return read_config(parser.read(argv))


def test_nothing_given_is_the_declared_defaults(parser: Parser) -> None:
    assert read(parser) == Config()


@pytest.mark.parametrize("argv", ["--max-num-seqs 7", "--max_num_seqs 7", "--max_num_seqs=7", "--max-num_seqs 7"])
def test_hyphens_and_underscores_are_the_same(parser: Parser, argv: str) -> None:
    assert read(parser, *argv.split()).scheduler.max_num_seqs == 7


def test_values_keep_their_underscores() -> None:
    words = ["--served_model_name", "my_model", "--chat_template=a_b.jinja", "--", "--not_an_option"]
    expected = ["--served-model-name", "my_model", "--chat-template=a_b.jinja", "--", "--not_an_option"]
    assert normalise(words) == expected


def test_booleans_have_a_no_form(parser: Parser) -> None:
    assert read(parser, "--no-enable-prefix-caching").cache.enable_prefix_caching is False
    assert read(parser, "--no_enable_prefix_caching", "--batch-invariant").runner.batch_invariant is True
    assert read(parser, "--no-async-scheduling").scheduler.async_scheduling is False


def test_choices_may_be_written_with_underscores(parser: Parser) -> None:
    assert read(parser, "--batching-policy", "prefill_first").scheduler.batching_policy == "prefill-first"


def test_lists_and_further_names(parser: Parser) -> None:
    config = read(parser, "--served-model-name", "a", "b", "--shutdown-timeout", "1.5", "-tp", "1")
    assert config.served_names == ("a", "b")
    assert config.server.shutdown_timeout_s == 1.5


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("1k", 1000), ("1K", 1024), ("2M", 2 * 2**20), ("2m", 2_000_000), ("4G", 4 * 2**30), ("1.5K", 1536),
     ("1g", 10**9), ("4GiB", 4 * 2**30)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "k", "-1", "1x", "1 000", "1e3", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="a size such as"):
        parse_size(text)


def test_sizes_are_read_where_sizes_are_meant(parser: Parser) -> None:
    config = read(parser, "--max-model-len", "1k", "--kv-cache-memory-bytes", "4G", "--max-num-batched-tokens", "2K")
    assert (config.model.max_model_len, config.cache.kv_cache_memory_bytes) == (1000, 4 * 2**30)
    assert config.scheduler.max_num_batched_tokens == 2048
    with pytest.raises(InvalidOption):
        read(parser, "--max-num-seqs", "1k")


def test_the_environment_is_below_the_command_line(parser: Parser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIVLLM_PORT", "8123")
    monkeypatch.setenv("MINIVLLM_MAX_MODEL_LEN", "2K")
    monkeypatch.setenv("MINIVLLM_ENABLE_PREFIX_CACHING", "false")
    monkeypatch.setenv("MINIVLLM_SERVED_MODEL_NAME", "a, b")
    config = read(parser)
    assert (config.server.port, config.model.max_model_len) == (8123, 2048)
    assert config.cache.enable_prefix_caching is False
    assert config.model.served_model_name == ("a", "b")
    assert read(parser, "--port", "9000").server.port == 9000


@pytest.mark.parametrize(("name", "value"), [("PORT", "x"), ("BATCH_INVARIANT", "maybe"), ("DTYPE", "fp8"), ("PORT", "70000")])
def test_a_bad_environment_value_names_itself(
    parser: Parser, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv("MINIVLLM_" + name, value)
    with pytest.raises(InvalidOption) as caught:
        read(parser)
    assert name.lower().replace("_", "-") in str(caught.value).lower().replace("_", "-")
    assert value in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--max-num-seq", "3"], "did you mean --max-num-seqs?"),
        (["--xyzzy"], "--help=all"),
        (["--max-num-seqs", "three"], "--max-num-seqs: 'three' is not a whole number"),
        (["--max-num-seqs", "0"], "--max-num-seqs must be from 1"),
        (["--max-num-seqs"], "--max-num-seqs: expected one argument"),
        (["--dtype", "fp8"], "auto, float32, bfloat16, float16"),
        (["--kv-cache-memory-bytes", "4Q"], "4K (4096)"),
        (["--port", "65536"], "from 0 to 65535"),
        (["--gpu-memory-utilization", "nan"], "--gpu-memory-utilization must be"),
        (["stray"], "'stray' is one argument too many"),
    ],
)
def test_mistakes_are_one_sentence(parser: Parser, argv: list[str], words: str) -> None:
    with pytest.raises(InvalidOption) as caught:
        read(parser, *argv)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_abbreviations_are_refused(parser: Parser) -> None:
    with pytest.raises(InvalidOption, match="There is no option --max-num;"):
        read(parser, "--max-num", "3")


def shown(parser: Parser, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parser.read(argv)
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_plain_help_shows_the_common_options_only(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    page = shown(parser, capsys, "--help")
    listed = [o for o in options() if o.flag + " " in page or "--[no-]" + o.flag[2:] in page or o.flag + "," in page]
    assert {o.name for o in listed} == {o.name for o in options() if o.opt.common}
    assert 10 < len(listed) <= 40
    assert "--help=all" in page


def test_all_help_shows_every_option(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    page = shown(parser, capsys, "--help=all")
    for option in options():
        assert option.flag.removeprefix("--") in page


@pytest.mark.parametrize("argv", [["--help=cache"], ["--help", "cache"], ["-h", "cache"]])
def test_help_of_one_group(parser: Parser, capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    page = shown(parser, capsys, *argv)
    assert "--block-size" in page
    assert "--num-gpu-blocks-override" in page
    assert "--port" not in page


def test_help_of_an_unknown_group_lists_the_groups(parser: Parser) -> None:
    with pytest.raises(InvalidOption, match=r"groups: all, .*kv cache"):
        parser.read(["--help=nothing"])


def test_help_is_not_asked_for_after_a_double_hyphen() -> None:
    assert help_topic(["--", "--help"]) is None
    assert help_topic(["--port", "1", "-h"]) == "common"


def test_sampling_options_reflect_every_field() -> None:
    parser = Parser("generate", "Generate.")
    add_sampling(parser)
    words = "--stop a b --stop-token-ids 1 2 --ignore-eos --top_p 0.5 --logit-bias 4=-100 7=1.5 --bad-words x"
    words += " --allowed-token-ids 3 --grammar regex:a:b+"
    given = read_sampling(parser.read(words.split()))
    assert given == {
        "stop": ("a", "b"), "stop_token_ids": (1, 2), "ignore_eos": True, "top_p": 0.5, "logit_bias": ((4, -100.0), (7, 1.5)),
        "bad_words": ("x",), "allowed_token_ids": (3,), "grammar": Grammar("regex", "a:b+"),
    }  # fmt: skip
    asked = {name: value for name, value in given.items() if name != "grammar"}
    told = {"logit_bias": {"4": -100.0, "7": 1.5}, "structured_outputs": {"regex": "a:b+"}}
    assert as_json(given) == {**asked, **told} and as_json({"n": 2}) == {"n": 2}
    with pytest.raises(InvalidOption, match="a kind"):
        parser.read(["--grammar", "xml:a"])
    with pytest.raises(InvalidOption, match="as in 42=-100"):
        parser.read(["--logit-bias", "4:1"])
    SamplingParams(**given)
    flags = {f for action in parser._actions for f in action.option_strings}
    for name in SamplingParams.__struct_fields__:
        assert name in ("seed", *SETTLED) or "--" + name.replace("_", "-") in flags


def test_flat_options_make_the_same_config(parser: Parser) -> None:
    config = read(parser, "--max-num-seqs", "5", "--dtype", "float32", "--no-enable-prefix-caching")
    assert make_config(**flat_options(config)) == config


def test_the_table_has_a_row_for_every_option_and_no_machine_path(tmp_path: Path) -> None:
    table = markdown()
    for option in options():
        assert f"| `{option.flag}`" in table
    assert str(Path(__file__).parents[2]) not in table
