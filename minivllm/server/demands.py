"""What a chat's answer is held to: a format that the request asks for, calls that it demands, and both behind the reasoning."""

import json
from dataclasses import dataclass

import msgspec

from minivllm.errors import InvalidRequest
from minivllm.server.tools import Offer
from minivllm.text.reply import ReasoningParser
from minivllm.text.reply_parsers import Parsers
from minivllm.text.tokenizer import Tokenizer
from minivllm.types import Grammar


@dataclass(frozen=True)
class Demands:
    """One request's: what it asked for, what it offers, and how its model writes."""

    format: Grammar | None  # of the answer's content
    offer: Offer
    parsers: Parsers
    tokenizer: Tokenizer

    def grammar(self, reasoner: ReasoningParser | None) -> Grammar | None:
        """What the text must be; None: anything. ``reasoner`` knows whether it begins with reasoning. Raises
        ``InvalidRequest`` for demands that exclude each other."""
        if self.offer.functions and self.parsers.tools is None:
            raise InvalidRequest(
                "It is not known how this model calls tools; start the server with --tool-call-parser NAME, or send none.",
                "tools",
            )
        if self.offer.demanded:
            if self.format is not None:
                raise InvalidRequest(
                    "A demanded tool call leaves no room for an answer in a format; ask for one of them.", "tool_choice"
                )
            calls = Grammar("lark", self._calls())
            return calls if self.parsers.harmony else self._behind(reasoner, calls)  # gpt-oss begins with what it is told
        if self.format is not None:
            return self._behind(reasoner, self._format_or_calls(self.format))
        if self.offer.functions and self.offer.strict:
            return self._behind(reasoner, self._calls_once_begun())
        return None

    def _calls(self) -> str:
        """A grammar of calls in the model's own way of writing."""
        if self.parsers.tools is None:
            raise RuntimeError("nobody knows how calls are written")
        return self.parsers.tools.grammar(self.offer.demanded or self.offer.functions, self.offer.parallel, self._mark)

    def _format_or_calls(self, asked: Grammar) -> Grammar:
        """The answer may still be a call of the model's choice."""
        if not self.offer.functions or self.parsers.harmony:  # gpt-oss' calls are no part of its final answer
            return asked
        if asked.kind != "json":
            raise InvalidRequest("Beside tools only a JSON format can be asked for; leave one out.", "structured_outputs")
        if self.parsers.trigger is None:
            raise InvalidRequest("No mark tells this model's calls from JSON; ask for a format or offer tools.", "tools")
        schema = {**json.loads(asked.source), **({"x-guidance": {"whitespace_flexible": False}} if asked.compact else {})}
        start, _, rest = self._calls().partition("start:")
        answer = json.dumps(schema, ensure_ascii=False)
        return Grammar("lark", f"start: an_answer | some_calls\nan_answer: %json {answer}\n{start}some_calls:{rest}")

    def _calls_once_begun(self) -> Grammar:
        """Free text, until the model begins a call."""
        trigger = self.parsers.trigger
        if trigger is None:
            raise InvalidRequest(
                "No mark begins this model's calls, so strict holds only for demanded ones; set it to false, or tool_choice to "
                '"required".', "tools",
            )  # fmt: skip
        return Grammar("lark", self._calls(), begins_after=(trigger,), keeps_last=True)

    def _behind(self, reasoner: ReasoningParser | None, grammar: Grammar) -> Grammar:
        """The same behind the reasoning, where there is some."""
        if reasoner is None or reasoner.reasons == "no":
            return grammar
        opener = tuple(self.tokenizer.encode(reasoner.OPENER, False)) if reasoner.reasons == "maybe" else ()
        after = (reasoner.END, *grammar.begins_after)
        return msgspec.structs.replace(grammar, begins_after=after, opener_ids=opener)

    def _mark(self, text: str) -> str:
        """A mark as the grammar needs it: special tokens are none of the letters that they are written with."""
        token_id = self.tokenizer.special_id(text)
        return json.dumps(text, ensure_ascii=False) if token_id is None else f"<[{token_id}]>"
