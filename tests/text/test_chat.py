"""Chat templates give what transformers' apply_chat_template gives, and refuse what it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from minivllm.errors import BrokenModelFolder, InvalidOption, InvalidRequest
from minivllm.text.chat import MAX_PROMPT_CHARS, ChatTemplate
from minivllm.text.tokenizer import Tokenizer, load_tokenizer

CHATML = """{% for m in messages %}
<|im_start|>{{ m['role'] }}
{{ m.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""
BRACKETS = """{{ bos_token }}{%- set ns = namespace(n=0) -%}
{%- for m in messages -%}
    {%- if m.role not in ['user', 'assistant'] %}{{ raise_exception('Only user and assistant, not ' + m.role) }}{% endif -%}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif -%}
    {%- if m.role == 'user' -%}[INST] {{ m.content | trim }} [/INST]{%- else -%}
    {% generation %} {{ m.content | trim }}{{ eos_token }}{% endgeneration %}{%- endif -%}
    {%- set ns.n = ns.n + 1 -%}
{%- endfor -%}"""
PARTS = """{% for m in messages %}[{{ m.role }}]
{%- if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endif %}
{% endfor %}"""
TOOLS = """{% for t in tools or [] %}{{ t | tojson }}|{{ t | tojson(indent=2) }}{% endfor %}
{%- for m in messages %}{% if m.role == 'skip' %}{% continue %}{% endif %}{{ m.content }}
    {%- if flag is defined %}{{ flag }}{% endif %}
{% endfor %}{{ unk_token }}"""

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello  <b>&'\"  "}],
    [
        {"role": "user", "content": " Tell me "},
        {"role": "assistant", "content": " Once\n 你好 "},
        {"role": "user", "content": "more"},
    ],
    [{"role": "system", "content": "Be nice"}, {"role": "user", "content": "x"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "And then  "}],
    [],
]


@pytest.fixture(scope="module")
def hf(trained: Path) -> Any:
    """The same tokenizer in transformers."""
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(trained / "tokenizer.json"), bos_token="<|end|>", eos_token="<|end|>", unk_token="<|user|>"
    )


def ours(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<|end|>", "eos_token": "<|end|>", "unk_token": "<|user|>"})


@pytest.mark.parametrize("source", [CHATML, BRACKETS, PARTS, TOOLS])
@pytest.mark.parametrize("options", [
    {"add_generation_prompt": True}, {"add_generation_prompt": False},
    {"add_generation_prompt": False, "tools": [{"type": "function", "name": "<é&>"}], "flag": 1},
    {"add_generation_prompt": False, "continue_final_message": True},
])
def test_same_as_transformers(hf: Any, source: str, options: dict[str, Any]) -> None:
    rendered = 0
    for chat in CHATS:
        try:
            expected = hf.apply_chat_template([dict(m) for m in chat], chat_template=source, tokenize=False, **options)
        except Exception:
            with pytest.raises(InvalidRequest):
                ours(source).render(chat, **options)
        else:
            assert ours(source).render(chat, **options) == expected
            rendered += 1
    assert rendered


def test_lists_of_parts(hf: Any) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two "}]
    chat = [{"role": "user", "content": parts}]
    assert ours(PARTS).render(chat) == hf.apply_chat_template(chat, chat_template=PARTS, tokenize=False) == "[user]<one><two >"
    assert ours(CHATML).render(chat).startswith("<|im_start|>user\none\ntwo <|im_end|>")
    going_on = ours(PARTS).render(chat, add_generation_prompt=False, continue_final_message=True)
    assert going_on == "[user]<one><two "
    assert chat[0]["content"] is parts and len(parts) == 2  # the caller's messages are not touched


def test_refusals_are_the_request_s() -> None:
    for source, messages, sentence in (
        (BRACKETS, [{"role": "tool", "content": "x"}], "Only user and assistant, not tool"),
        ("{{ messages[0].nothing.more }}", [{"role": "user", "content": "x"}], "nothing"),
        ("{{ 1 + messages[0].content }}", [{"role": "user", "content": "x"}], "unsupported operand"),
        ("{{ ''.__class__.__mro__ }}", [{"role": "user", "content": "x"}], "unsafe"),
        ("{% for i in range(9999999) %}{% endfor %}", [{"role": "user"}], "Range too big"),
        ("{{ messages.append(1) }}", [{"role": "user"}], "unsafe|append"),
        (CHATML, [], "messages is empty"),
        (CHATML, ["text"], "messages\\[0\\]"),
        (CHATML, [{"content": "x"}], "role"),
        (CHATML, [{"role": "user", "content": 5}], "content"),
        (CHATML, [{"role": "user", "content": [{"type": "image_url"}]}], "content"),
    ):
        with pytest.raises(InvalidRequest, match=sentence):
            ours(source).render(messages)  # type: ignore[arg-type]


def test_missing_content_is_empty() -> None:
    assert ours("{{ messages[0].content }}|").render([{"role": "assistant", "content": None}]) == "|"
    assert ours("{{ messages[0].content }}|").render([{"role": "assistant"}]) == "|"


def test_output_is_bounded() -> None:
    source = "{% for i in range(1000) %}{{ messages[0].content }}{% endfor %}"
    assert len(ours(source).render([{"role": "user", "content": "x" * 1000}])) == 10**6
    with pytest.raises(InvalidRequest, match="characters"):
        ours(source).render([{"role": "user", "content": "x" * (MAX_PROMPT_CHARS // 999)}])


def test_continuing_needs_a_final_message_and_no_generation_prompt() -> None:
    chat = [{"role": "user", "content": "x"}]
    silent = [*chat, {"role": "assistant", "content": ""}]
    for messages, options in ((silent, {"add_generation_prompt": False}), (chat, {"add_generation_prompt": True})):
        with pytest.raises(InvalidRequest, match="continue_final_message"):
            ours(CHATML).render(messages, continue_final_message=True, **options)
    with pytest.raises(InvalidRequest, match="continued"):
        ours("{{ messages[0].content | length }}").render(chat, add_generation_prompt=False, continue_final_message=True)


def test_where_the_template_comes_from(tmp_path: Path, save: Callable[..., Path], trained: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(trained / "tokenizer.json"))
    chat = [{"role": "user", "content": "x"}]

    def rendered(folder: Path, override: str | None = None) -> str:
        return load_tokenizer(folder, override).render_chat(chat)

    assert rendered(save(tmp_path / "a", backend, chat_template="config")) == "config"
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert rendered(save(tmp_path / "b", backend, chat_template=several)) == "plain"
    (tmp_path / "a" / "chat_template.jinja").write_text("file {{ bos_token }}|{{ messages[0].content }}")
    assert rendered(tmp_path / "a") == "file |x"
    given = tmp_path / "given.jinja"
    given.write_text("given")
    assert rendered(tmp_path / "a", str(given)) == "given"

    bare = load_tokenizer(save(tmp_path / "c", backend))
    assert not bare.has_chat_template
    with pytest.raises(InvalidRequest, match="no chat template; use /v1/completions"):
        bare.render_chat(chat)

    given.write_text("{% if %}")
    for override in (str(given), str(tmp_path / "absent")):
        with pytest.raises(InvalidOption, match="--chat-template"):
            rendered(tmp_path / "a", override)
    for broken in ("{% for %}", [{"name": "default"}], ["x"]):
        with pytest.raises(BrokenModelFolder, match="chat template"):
            load_tokenizer(save(tmp_path / "d", backend, chat_template=broken))


def test_bundled_template(bundled_model: Path) -> None:
    if not (bundled_model / "tokenizer.json").is_file():
        pytest.skip("the bundled tokenizer is not there")
    tokenizer: Tokenizer = load_tokenizer(bundled_model)
    prompt = tokenizer.render_chat([{"role": "user", "content": "Tell me a story."}])
    assert "Tell me a story." in prompt
    assert any(i in tokenizer.special_ids for i in tokenizer.encode(prompt, add_special_tokens=False))
