"""``LLM``: generate from a Python program, in this process, a batch at a time.

The same engine, scheduler and text room as the server's, without processes and event loops: what a script, a notebook or a
test wants.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec

from minivllm.beams import BeamSearch, BeamSearchParams
from minivllm.config import make_config
from minivllm.door import check_prompt, locate, settle, spell, tokenizer_folder
from minivllm.engine.build import build_engine
from minivllm.errors import GenerationFailed, InvalidRequest
from minivllm.observe.explain import Explanations
from minivllm.observe.explanation import Explanation
from minivllm.observe.recording import Recorder
from minivllm.observe.trail import Trail
from minivllm.records import EngineOutput
from minivllm.text.outputs import OutputProcessor
from minivllm.text.tokenizer import Tokenizer, load_tokenizer
from minivllm.types import (
    REFUSED,
    EngineInfo,
    FinishReason,
    GenerateRequest,
    Grammar,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)

if TYPE_CHECKING:
    from llguidance import LLTokenizer


@dataclass
class Completion:
    """A prompt and what was generated for it. Written by ``LLM.generate`` until it returns."""

    prompt: str | None  # None when it was given as token ids
    prompt_ids: tuple[int, ...]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached: int = 0  # prompt tokens found in the prefix cache
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of ``token_ids``, where they were asked for
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # of ``prompt_ids``, where asked for; of the first, None
    explanation: Explanation | None = None  # where its time went, where that was asked for


class LLM:
    """A model ready to generate. Written by the thread that calls it."""

    def __init__(self, model: str | None = None, **options: Any) -> None:
        """Load a model (a folder or a hub name; none: the bundled one). ``options`` are those of ``mini-vllm serve``. Raises
        ``StartupError``."""
        config = make_config(**options, **({"model": model} if model is not None else {}))
        config, folder = locate(config)
        path = config.observe.record_steps
        self._recorder = None if path is None else Recorder(path)
        self.config = config = replace(config, observe=replace(config.observe, step_records=0))  # nobody could ask for them
        self.tokenizer: Tokenizer = load_tokenizer(tokenizer_folder(config, folder), config.model.chat_template)
        self.engine = build_engine(config)
        if self._recorder is not None:
            self._recorder.begin(self.engine.info, config.served_names[0])
        self._seeds = random.Random(config.model.seed)
        self._next_id = 0
        self._vocabulary: LLTokenizer | None = None

    @property
    def info(self) -> EngineInfo:
        """What the engine settled on at start."""
        return self.engine.info

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams],
        progress: Callable[[int], None] | None = None,
        *,
        explain: bool = False,
    ) -> list[Completion]:
        """Generate for all prompts as one changing batch; results come in the order of the prompts, the n of one prompt beside
        each other.

        ``sampling`` is one for all or one for each. ``progress`` is called with the number of new tokens after each step. With
        ``explain`` each completion has an ``explanation``: where its time went, from the moment that its prompt was taken up.
        Raises ``RequestError`` before anything runs when a prompt or its sampling cannot be served, ``GenerationFailed`` when
        the engine could not finish.
        """
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(each)} sampling parameters")
        outputs = OutputProcessor(self.tokenizer)
        requests: list[GenerateRequest] = []
        done: dict[str, Completion] = {}
        book = Explanations(self.config.served_names[0], capacity=2**31) if explain else None
        for prompt, params in zip(prompts, each, strict=True):
            trail, new = Trail(time.monotonic()), len(requests)
            first = self._request(prompt, params, trail)
            of_prompt: list[TokenLogprobs | None] | None = None if params.prompt_logprobs is None else [None]
            for i in range(params.n):
                request = first if i == 0 else self._another(first, i, params.seed)
                requests.append(request)
                completion = Completion(prompt if isinstance(prompt, str) else None, request.prompt_ids)
                completion.prompt_logprobs = of_prompt  # the first is told of them, and all have one prompt
                done[request.id] = completion
            if book is not None:
                book.open(first.id if params.n == 1 else f"{first.id}-all", requests[new:], trail)
        try:
            for request in requests:
                self.engine.add(request)
                outputs.add(request.id, request.prompt_ids, request.sampling)
            self._run(outputs, done, progress, book)
        except BaseException:
            self.engine.abort(list(done))
            raise
        return list(done.values())

    def beam_search(self, prompts: Sequence[str | Sequence[int]], params: BeamSearchParams) -> list[list[Completion]]:
        """The ``beam_width`` best texts of each prompt, best first. Raises what ``generate`` does."""
        searches, most = [], min(self.config.model.max_logprobs, self.info.vocab_size)
        for prompt in prompts:
            ids = self._request(prompt, SamplingParams(max_tokens=1)).prompt_ids
            params.check(len(ids), self.info.max_model_len, most)
            searches.append(BeamSearch(ids, params, self.info.eos_token_ids))
        cached: list[int] = []
        while asked := [ids for search in searches for ids in search.asks]:
            done = self.generate(asked, params.step)
            cached = cached or [completion.num_cached for completion in done]
            told = iter(done)
            for search in searches:
                if every := search.asks:
                    search.take([next(told).logprobs[0] for _ in every])
        return [
            [self._told(prompt, search, output) for output in search.outputs("beam", self.tokenizer, found)]
            for prompt, search, found in zip(prompts, searches, cached, strict=True)
        ]

    def _told(self, prompt: str | Sequence[int], search: BeamSearch, output: RequestOutput) -> Completion:
        completion = Completion(prompt if isinstance(prompt, str) else None, search.prompt_ids)
        _extend(completion, output)
        return completion

    def _request(
        self, prompt: str | Sequence[int], params: SamplingParams, trail: Trail | None = None
    ) -> GenerateRequest:
        trail = trail or Trail(time.monotonic())
        trail.begin("tokenize")
        if isinstance(prompt, int):
            raise InvalidRequest("prompts is a list of texts or of lists of ids; put these ids into one more list.", "prompt")
        ids = tuple(self.tokenizer.encode(prompt)) if isinstance(prompt, str) else tuple(prompt)
        check_prompt(ids, self.info.vocab_size)
        params = spell(params, self.tokenizer, self.info.vocab_size, self.config.model.max_logprobs)
        if params.grammar is not None:
            self._check_grammar(params.grammar)
        params = settle(params, len(ids), self.info.max_model_len, self._seeds.getrandbits(63))
        self._next_id += 1
        trail.finish()
        return GenerateRequest(
            id=f"local-{self._next_id}",
            prompt_ids=ids,
            sampling=params,
            arrival_s=time.monotonic(),
            received_s=trail.received_s,
        )

    def _check_grammar(self, grammar: Grammar) -> None:
        """Raise ``InvalidRequest`` for one that cannot be followed."""
        from minivllm.text.grammar import try_out, vocabulary  # costs something, and few need it

        if self._vocabulary is None:
            self._vocabulary = vocabulary(self.tokenizer, self.info.vocab_size, self.info.eos_token_ids)
        try_out(grammar, self._vocabulary)

    def _another(self, first: GenerateRequest, sample_index: int, seed: int | None) -> GenerateRequest:
        """A further text of the same prompt."""
        self._next_id += 1
        drawn = self._seeds.getrandbits(63) if seed is None else seed
        sampling = msgspec.structs.replace(first.sampling, seed=drawn, prompt_logprobs=None)
        return msgspec.structs.replace(
            first, id=f"local-{self._next_id}", sampling=sampling, sample_index=sample_index, fork_of=first.id
        )

    def _run(
        self,
        outputs: OutputProcessor,
        done: dict[str, Completion],
        progress: Callable[[int], None] | None,
        book: Explanations | None,
    ) -> None:
        while self.engine.has_work:
            message = self._step()
            if message is None:
                continue
            if book is not None and message.record is not None:
                book.observe(message.record)
            news, to_abort = outputs.process(message.events)
            self.engine.abort(to_abort)
            for output in news:
                _extend(done[output.id], output)
                if book is not None and output.finish_reason is not None:
                    now_s = time.monotonic()
                    book.end(output.id, output.finish_reason, output.num_output, now_s)
                    done[output.id].explanation = book.explain(output.id, now_s)
            if progress is not None:
                progress(sum(len(e.token_ids) for e in message.events))

    def _step(self) -> EngineOutput | None:
        """The engine's next step, recorded if steps are."""
        message = self.engine.step()
        if self._recorder is not None and message is not None and message.record is not None:
            self._recorder.add(message.record)
        return message

    def close(self) -> None:
        """Let the engine and its memory go, and end the recording."""
        if self._recorder is not None:
            self._recorder.close()
        del self.engine


def _extend(completion: Completion, output: RequestOutput) -> None:
    if output.finish_reason == "error":
        kind = InvalidRequest if output.stop_reason == REFUSED else GenerationFailed
        raise kind(output.error or "The engine could not compute this request; try it again.")
    completion.text += output.text
    completion.token_ids += output.token_ids
    completion.logprobs += output.logprobs
    if completion.prompt_logprobs is not None:
        completion.prompt_logprobs += output.prompt_logprobs
    completion.finish_reason = output.finish_reason
    completion.stop_reason = output.stop_reason
    completion.num_cached = output.num_cached
