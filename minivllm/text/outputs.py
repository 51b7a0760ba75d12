"""From the engine's tokens to what a client sees: text, stop strings, finish reasons, counts.

The engine ends a sequence by tokens (eos, stop token ids, length); text ends here. A stop string is seen when its last
character is decoded, which may be some steps after the engine sampled it: tokens after the match are in no text and no count,
later events of that id are dropped, and the engine is asked to abort the rest. Runs where the text is, never beside the model.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from minivllm.text.detokenizer import Detokenizer
from minivllm.text.stop import StopMatcher
from minivllm.text.tokenizer import Tokenizer
from minivllm.types import RequestOutput, SamplingParams, TokenEvent

_FAULT = "The server failed to write the text of this answer; its log says why."

log = logging.getLogger("minivllm")


@dataclass(slots=True)
class _Open:
    """One request whose stream has not ended. Written only by ``OutputProcessor``."""

    detokenizer: Detokenizer
    stops: StopMatcher | None
    sampling: SamplingParams
    num_prompt: int
    shown_ids: frozenset[int]
    num_output: int = 0
    num_cached: int = 0

    def show(self, text: str) -> str:
        """Of new text, what can be sent now."""
        if self.stops is None:
            return text
        return self.stops.feed(text, armed=self.num_output > self.sampling.min_tokens) if text else ""

    @property
    def stopped_by(self) -> str | None:
        """The stop string that was found."""
        return None if self.stops is None else self.stops.matched

    def finish(self) -> str:
        """What is left when the stream ends: an unfinished character, then text held back for a stop string."""
        text = self.show(self.detokenizer.finish())
        return text if self.stops is None or self.stops.matched is not None else text + self.stops.flush()


class OutputProcessor:
    """The open requests' text states. Written only by the face that owns it (``AsyncLLM`` or ``LLM``)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._open: dict[str, _Open] = {}

    def __len__(self) -> int:
        """Number of open requests."""
        return len(self._open)

    def add(
        self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingParams, shown_ids: frozenset[int] = frozenset()
    ) -> None:
        """Begin a request; special tokens ``shown_ids`` stand in its text. Raises ``ValueError`` for an id that is open
        already."""
        if request_id in self._open:
            raise ValueError(f"request {request_id!r} is open already")
        self._open[request_id] = _Open(
            detokenizer=self._tokenizer.detokenizer(prompt_ids, sampling.skip_special_tokens, shown_ids),
            stops=StopMatcher(sampling.stop, sampling.include_stop_str_in_output) if sampling.stop else None,
            sampling=sampling,
            num_prompt=len(prompt_ids),
            shown_ids=shown_ids,
        )

    def drop(self, request_id: str) -> None:
        """Forget a request whose client went away; its later events are dropped."""
        self._open.pop(request_id, None)

    def process(self, events: Iterable[TokenEvent]) -> tuple[list[RequestOutput], list[str]]:
        """Turn events into outputs, one each, and name the ids that the engine must abort since a stop string ended them."""
        outputs: list[RequestOutput] = []
        aborts: list[str] = []
        for event in events:
            state = self._open.get(event.id)
            if state is None:
                continue
            try:
                output = _advance(state, event)
            except Exception:
                log.exception("request %s failed when its tokens were to become text", event.id)
                output = RequestOutput(
                    id=event.id, text="", token_ids=(), finish_reason="error", error=_FAULT, num_prompt=state.num_prompt
                )
            outputs.append(output)
            if output.finish_reason is not None:
                del self._open[event.id]
                if event.finish_reason is None:
                    aborts.append(event.id)
        return outputs, aborts


def _advance(state: _Open, event: TokenEvent) -> RequestOutput:
    """Apply one event to its request's state."""
    if state.stops is None and event.finish_reason is None:  # nearly every event
        add = state.detokenizer.add
        token_ids = event.token_ids
        text = add(token_ids[0]) if len(token_ids) == 1 else "".join([add(token_id) for token_id in token_ids])
        state.num_output += len(token_ids)
        if event.num_cached > state.num_cached:
            state.num_cached = event.num_cached
        return RequestOutput(
            id=event.id,
            text=text,
            token_ids=token_ids,
            num_prompt=state.num_prompt,
            num_output=state.num_output,
            num_cached=state.num_cached,
            logprobs=event.logprobs,
            prompt_logprobs=event.prompt_logprobs,
        )
    return _advance_with_care(state, event)


def _advance_with_care(state: _Open, event: TokenEvent) -> RequestOutput:
    """Apply an event that may be the end: the engine's, or that of a stop string."""
    state.num_cached = max(state.num_cached, event.num_cached)
    finish_reason, stop_reason = event.finish_reason, event.stop_reason
    # The token that ended it (eos or a stop token) counts as output, but its text is shown only on request.
    hides_last = finish_reason == "stop" and not event.complete and not state.sampling.include_stop_str_in_output
    hides_last = hides_last and event.token_ids[-1] not in state.shown_ids
    num_shown = len(event.token_ids) - hides_last
    text: list[str] = []
    taken = 0
    for token_id in event.token_ids:
        taken += 1
        state.num_output += 1
        if taken <= num_shown:
            text.append(state.show(state.detokenizer.add(token_id)))
            if state.stopped_by is not None:
                break
    if finish_reason is not None and state.stopped_by is None:
        text.append(state.finish())
    matched = state.stopped_by
    return RequestOutput(
        id=event.id,
        text="".join(text),
        token_ids=event.token_ids[:taken],
        finish_reason="stop" if matched is not None else finish_reason,
        stop_reason=matched if matched is not None else stop_reason,
        num_prompt=state.num_prompt,
        num_output=state.num_output,
        num_cached=state.num_cached,
        error=None if matched is not None else event.error,
        logprobs=event.logprobs[:taken],
        prompt_logprobs=event.prompt_logprobs,
    )
