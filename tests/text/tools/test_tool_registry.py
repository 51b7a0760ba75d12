"""Parsers by name, and by what a chat template says."""

import pytest

from minivllm.text.tools.registry import PARSERS, detect, load_parser

OURS = ["hermes", "llama3_json", "mistral", "deepseek_v3"]

# The lines of public models' templates by which they are told apart, shortened.
TEMPLATES = {
    "qwen3": (
        "hermes",
        r"""{%- if tools %}{{- "# Tools\n\nwithin <tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": """
        r"""<function-name>, \"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n" }}{%- endif %}""",
    ),
    "hermes 2 pro": (
        "hermes",
        r"""{% for tool in tools %}{% endfor %}{{- '<tool_call>\n"""
        r"""{"name": <function-name>, "arguments": <args-dict>}\n</tool_call>' }}""",
    ),
    "qwen3-coder": (
        "qwen3_coder",
        r"""{%- for tool in tools %}{%- endfor %}{{- '\n<tool_call>\n<function=example_function_name>\n"""
        r"""<parameter=example_parameter_1>\nvalue_1\n</parameter>\n</function>\n</tool_call>' }}""",
    ),
    "mistral v3": ("mistral", """{%- if tools is not none %}[AVAILABLE_TOOLS]{%- endif %}{{- "[TOOL_CALLS] [" }}"""),
    "mistral v11": ("mistral", """{%- if tools %}{%- endif %}{{- '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}"""),
    "deepseek r1": (
        "deepseek_v3",
        """{% if tools is defined %}{% endif %}"""
        """{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>'}}""",
    ),
    "llama 3.1": (
        "llama3_json",
        """{%- if tools is not none %}{{- 'Respond in the format {"name": function name, "parameters": dictionary of """
        """argument name and its value}.' }}{%- endif %}{{- "<|python_tag|>" + tool_call.name + ".call(" }}""",
    ),
    "llama 3.2": (
        "llama3_json",
        """{%- if not tools is none %}{{- 'Respond in the format {"name": function name, "parameters": dictionary of """
        """argument name and its value}.' }}{%- endif %}""",
    ),
    "llama 3.2 in Python": (
        "pythonic",
        "{%- if tools is not none %}{{- 'Respond in the format [func_name1(params_name1=params_value1, "
        "params_name2=params_value2...), func_name2(params)] ' }}{%- endif %}",
    ),
    "gpt-oss": ("openai", """{%- if tools %}{%- endif %}{{- "<|start|>assistant<|channel|>commentary to=functions.x" }}"""),
    "glm 4.5": (None, "{%- if tools %}<tool_call>{function-name}\n<arg_key>{k}</arg_key>\n</tool_call>{%- endif %}"),
    "chatml": (None, "{% for message in messages %}{{'<|im_start|>' + message['role'] + message['content']}}{% endfor %}"),
    "marks without functions": (None, "{% for m in messages %}{{ m['content'].split('[TOOL_CALLS]')[0] }}{% endfor %}"),
    "nothing": (None, ""),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_tells_its_parser(name: str) -> None:
    expected, template = TEMPLATES[name]
    assert detect(template) == expected
    assert expected is None or expected in PARSERS


@pytest.mark.parametrize("name", OURS)
def test_parsers_are_loaded_by_name(name: str) -> None:
    parser = load_parser(name)
    module, _, attribute = PARSERS[name].partition(":")
    assert (parser.__module__, parser.__name__) == (module, attribute)
    reader = parser([])
    assert [*reader.feed("Hello"), *reader.finish()][0].text == "Hello"
    assert parser.MARKS


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(KeyError):
        load_parser("hermès")
