"""Chat templates: a list of messages becomes the prompt text that the model was trained on.

A template is a Jinja program that comes with the model, written for transformers' ``apply_chat_template``; the environment
here offers the same words (``raise_exception``, ``strftime_now``, ``tojson``, loop controls, the ``generation`` block), so that
the same template gives the same text. It is somebody else's program: it runs in Jinja's immutable sandbox, whatever goes
wrong in it is the request's error and never the server's, and what it may write is bounded.

Knows nothing of tokens.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minivllm.errors import InvalidRequest

MAX_PROMPT_CHARS = 16 * 2**20
_CUT_MARK = "<<the final message goes on here>>"


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for training; for a prompt its body is all there is to it."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own way to declare it)

    def parse(self, parser: Parser) -> nodes.Node:
        """Read the block as a plain scope."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _NothingBeforehand(CodeGenerator):
    """Compiles without working out constants: ``{{ 'x' * 10**10 }}`` would be made while a template is only looked at."""

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if isinstance(node, nodes.TemplateData):
            return super()._output_child_to_const(node, frame, finalize)
        raise nodes.Impossible


class _Names(_NothingBeforehand, jinja2.meta.TrackingCodeGenerator):
    """Finds the names that a template reads; Jinja's own way to them works out constants too."""

    def __init__(self, environment: ImmutableSandboxedEnvironment) -> None:
        jinja2.meta.TrackingCodeGenerator.__init__(self, environment)
        self.optimizer = None


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own ``tojson`` escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """A compiled template. Never changed after it is made. Raises ``jinja2.TemplateError`` for one that does not compile."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols], optimized=False
        )
        environment.code_generator_class = _NothingBeforehand
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self.source = source
        self.special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
            tree, names = environment.parse(source), _Names(environment)
            names.visit(tree)
        except (RecursionError, MemoryError, SyntaxError) as error:  # of Python's own compiler: nested beyond its bounds
            raise jinja2.TemplateError(f"it is nested too deeply ({type(error).__name__})") from None
        self._reads_parts = _loops_over_content(tree)
        ours = {"messages", "add_generation_prompt", *special_tokens, *environment.globals}
        self.reads = frozenset(names.undeclared_identifiers - ours)  # names that a request may give

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_values: Any,
    ) -> str:
        """The prompt text. Raises ``InvalidRequest`` with the template's own words when it refuses the messages.

        ``template_values`` are further names that the template may read (``tools``, ``documents`` and whatever it defines).
        """
        if not messages:
            raise InvalidRequest("messages is empty; send at least one message.", "messages")
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other; set add_generation_prompt to false.",
                "continue_final_message",
            )
        chat = [self._plain(i, message) for i, message in enumerate(messages)]
        final = _mark_end(chat) if continue_final_message else ""
        values = {"tools": None, "documents": None, **self.special_tokens, **template_values}
        text = self._run({**values, "messages": chat, "add_generation_prompt": add_generation_prompt})
        return _cut_at_mark(text, final) if continue_final_message else text

    def _run(self, values: dict[str, Any]) -> str:
        """Render, within the bound."""
        parts: list[str] = []
        length = 0
        try:
            for part in self._template.generate(values):
                parts.append(part)
                length += len(part)
                if length > MAX_PROMPT_CHARS:
                    break
        except MemoryError:
            raise
        except Exception as exc:  # the template is a stranger's program: any way it can fail is about this request
            raise InvalidRequest(f"The model's chat template refused the messages: {exc}", "messages") from exc
        if length > MAX_PROMPT_CHARS:
            raise InvalidRequest(
                f"The chat template wrote over {MAX_PROMPT_CHARS} characters; send fewer or shorter messages.", "messages"
            )
        return "".join(parts)

    def _plain(self, index: int, message: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of a message, its content as text unless the template reads lists of parts itself."""
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequest(f"messages[{index}] must be an object with a role.", "messages")
        content = message.get("content")
        if content is None:
            content = ""  # an assistant's turn that only called tools
        elif isinstance(content, list | tuple):
            texts = [_part_text(index, part) for part in content]
            content = [{"type": "text", "text": text} for text in texts] if self._reads_parts else "\n".join(texts)
        elif not isinstance(content, str):
            raise InvalidRequest(f"messages[{index}].content must be a text or a list of text parts.", "messages")
        return {**message, "content": content}


def _part_text(index: int, part: Any) -> str:
    """The text of one content part; other kinds (images, audio) are refused."""
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise InvalidRequest(f"messages[{index}].content may hold only parts of the form {{type: text, text: ...}}.", "messages")


def _loops_over_content(tree: nodes.Template) -> bool:
    """True when some loop of the template runs over a message's ``content``: then it takes lists of parts."""
    for loop in tree.find_all(nodes.For):
        for node in [loop.iter, *loop.iter.find_all((nodes.Name, nodes.Getattr, nodes.Getitem))]:
            if isinstance(node, nodes.Name) and node.name == "content":
                return True
            if isinstance(node, nodes.Getattr) and node.attr == "content":
                return True
            if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == "content":
                return True
    return False


def _mark_end(chat: list[dict[str, Any]]) -> str:
    """Put a mark behind the last message's text, so that its end can be found in what the template makes of it.

    The mark ends in a space: when that is gone afterwards, the template trims, and so must the cut. (The idea, and what the
    result is, are those of transformers.)
    """
    content = chat[-1]["content"]
    if isinstance(content, str) and content:
        chat[-1]["content"] = content + _CUT_MARK + " "
        return content
    if isinstance(content, list) and content:
        text = str(content[-1]["text"])
        content[-1] = {"type": "text", "text": text + _CUT_MARK + " "}
        return text
    raise InvalidRequest("continue_final_message needs a last message that has text to continue.", "continue_final_message")


def _cut_at_mark(text: str, final: str) -> str:
    """The rendered text up to the end of the last message."""
    where = text.rfind(_CUT_MARK)
    if where < 0 or final.strip() not in text:
        raise InvalidRequest("The model's chat template changes the last message, so it cannot be continued.", "messages")
    kept = text[:where]
    return kept if text.startswith(_CUT_MARK + " ", where) else kept.rstrip()
