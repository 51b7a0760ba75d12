"""Every record that crosses a folder boundary; those that tell of steps are in ``records.py``.

All are immutable msgspec Structs (``frozen=True, gc=False``: making one costs a tenth of a frozen dataclass, and the garbage
collector never walks them). They hold plain ints, floats, strings and tuples: the same values are handed over in one
process, framed as msgpack between processes, recorded to disk and replayed by tests. No tensor ever appears here.

Words: a *row* is a running sequence's place in the runner (0 .. max_num_seqs - 1); a *block* holds ``block_size`` KV slots; a
*KV slot* is one token's place in the cache; a *group* is a set of layers that share block tables; a *step* is one pass of the
model over a batch. ``docs/architecture.md`` has the glossary.
"""

import math
from typing import Literal

import msgspec

from minivllm.errors import InvalidRequest

GREEDY_BELOW = 1e-5  # temperatures under this are greedy, as OpenAI-compatible servers do
LOWEST_TEMPERATURE = 0.01  # smaller positive temperatures are raised to this: logits / t would overflow in 16 bits
MAX_LOGPROBS = 20  # likeliest tokens that a request may ask for at each position
MAX_SAMPLES = 128  # texts that a request may ask for of one prompt
MAX_BIASED = 1024  # tokens that a logit_bias may name
MAX_BAD_WORDS = 256  # each is compared with the end of the output at every token
MAX_STOP_CHARS = 2**16  # of all stop strings of a request: their automaton takes some 300 bytes a character
MAX_GRAMMAR_CHARS = 2**18  # of one grammar's source

MAX_PATTERN = 512  # tokens of a pattern that a text may be ended for: so many are looked through at every token

BlockIds = tuple[tuple[int, ...], ...]  # per KV group; (): none in any
FinishReason = Literal["stop", "length", "abort", "error", "repetition"]
GUIDE_FAULT = "The engine failed at following the grammar of this request; its log says why."
REFUSED = "refused"  # stop_reason of an error that is the request's own: it asked for what turned out to be impossible

SETTLED = frozenset({"bad_word_ids"})  # fields of SamplingParams that no user gives: whoever takes a request fills them in

# What a row wants of a step (RowWork.wants), as bits.
WANT_SAMPLE = 1  # logits of the last position and a token from them
WANT_PROMPT_LOGPROBS = 2  # logprobs of the prompt's tokens that follow those of the chunk
WANT_POOL = 4  # the final hidden state instead of a token

# What the first word of a row's grammar mask says; a token's id says that it alone may come.
ANY_TOKEN = -1
BY_BITS = -2  # those that have a bit in the words behind


class Grammar(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What a text has to be. ``text/grammar.py`` makes it of what clients send, and says what each kind's ``source`` is."""

    kind: Literal["json", "regex", "lark"]
    source: str  # a JSON Schema, a regular expression or a grammar in llguidance's kind of Lark
    compact: bool = False  # JSON without any whitespace between its parts
    begins_after: tuple[str, ...] = ()  # the text is free until these have come one after the other; (): bound from its start
    keeps_last: bool = False  # the last of these is the beginning of what the grammar describes
    opener_ids: tuple[int, ...] = ()  # with these at the text's beginning all of ``begins_after`` holds, else without its first

    def __post_init__(self) -> None:
        """Raise ``InvalidRequest`` for one that is empty or too long to look at."""
        if not 0 < len(self.source) <= MAX_GRAMMAR_CHARS:
            raise InvalidRequest(f"A grammar must have from 1 to {MAX_GRAMMAR_CHARS} characters, this has {len(self.source)}.")


class RepetitionDetection(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, forbid_unknown_fields=True):
    """When a text ends because it says the same over and over: when its last tokens are a pattern, ``min_count`` times."""

    max_pattern_size: int = 0  # tokens; 0: never
    min_pattern_size: int = 0  # tokens; 0 means 1
    min_count: int = 0

    def __post_init__(self) -> None:
        """Raise ``InvalidRequest`` for what is out of range."""
        if not 0 <= self.min_pattern_size <= self.max_pattern_size <= MAX_PATTERN:
            raise InvalidRequest(
                f"max_pattern_size must be from 0 to {MAX_PATTERN}, and min_pattern_size from 0 to max_pattern_size.",
                "repetition_detection",
            )
        if self.max_pattern_size and not 2 <= self.min_count < 2**31:
            raise InvalidRequest("min_count must be at least 2: what is said once is no repetition.", "repetition_detection")
        if self.min_count and not self.max_pattern_size:
            raise InvalidRequest("min_count has no effect without max_pattern_size; give both.", "repetition_detection")


class SamplingParams(msgspec.Struct, frozen=True, gc=False, kw_only=True, omit_defaults=True):
    """How one request's tokens are chosen and where its text ends.

    The only place that checks these values: every face (HTTP routes, ``LLM``, command line) builds this type, so none can skip
    a check. Raises ``InvalidRequest`` with the field in ``param``.
    """

    n: int = 1  # texts of one prompt, each with random numbers of its own; a face makes as many requests of it
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None  # None: drawn on arrival, so that every request can be replayed
    max_tokens: int | None = None  # None: as many as fit into the context
    min_tokens: int = 0
    logprobs: int | None = None  # likeliest tokens to tell of each position beside the chosen one; None: no logprobs
    prompt_logprobs: int | None = None  # the same of each position of the prompt but the first
    logit_bias: tuple[tuple[int, float], ...] = ()  # token, what is added to its logit; a token once
    allowed_token_ids: tuple[int, ...] | None = None  # None: all
    bad_words: tuple[str, ...] = ()
    bad_word_ids: tuple[tuple[int, ...], ...] = ()  # the ways to write ``bad_words``; set by the face that accepts the request
    grammar: Grammar | None = None  # None: any text
    stop: tuple[str, ...] = ()  # matched on text, in the text room; the engine never sees them act
    stop_token_ids: tuple[int, ...] = ()
    repetition_detection: RepetitionDetection | None = None  # None: a text may repeat itself
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        """Check every range, then bring equal settings into one form (greedy has no top_p, seed -1 is no seed)."""
        _check_sampling(self)
        put = msgspec.structs.force_setattr
        if self.temperature < GREEDY_BELOW:
            for name, value in (("temperature", 0.0), ("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
                put(self, name, value)
        elif self.temperature < LOWEST_TEMPERATURE:
            put(self, "temperature", LOWEST_TEMPERATURE)
        if self.top_k == -1:
            put(self, "top_k", 0)
        if self.seed == -1:
            put(self, "seed", None)

    @property
    def greedy(self) -> bool:
        """True when the most likely token is always taken."""
        return self.temperature == 0.0


def _check_sampling(p: SamplingParams) -> None:
    """Raise ``InvalidRequest`` naming the first field that is out of its range."""
    if not 1 <= p.n <= MAX_SAMPLES:
        raise InvalidRequest(f"n must be from 1 to {MAX_SAMPLES}, got {p.n}.", "n")
    if p.n > 1 and p.temperature < GREEDY_BELOW:
        raise InvalidRequest("n must be 1 at temperature 0: all texts would be the same one.", "n")
    for name, low, high in (
        ("temperature", 0.0, 2.0),
        ("min_p", 0.0, 1.0),
        ("presence_penalty", -2.0, 2.0),
        ("frequency_penalty", -2.0, 2.0),
    ):
        value = getattr(p, name)
        if not (math.isfinite(value) and low <= value <= high):
            raise InvalidRequest(f"{name} must be a number from {low:g} to {high:g}, got {value}.", name)
    if not (math.isfinite(p.top_p) and 0.0 < p.top_p <= 1.0):
        raise InvalidRequest(f"top_p must be over 0 and at most 1, got {p.top_p}.", "top_p")
    if not (math.isfinite(p.repetition_penalty) and p.repetition_penalty > 0.0):
        raise InvalidRequest(f"repetition_penalty must be over 0, got {p.repetition_penalty}.", "repetition_penalty")
    if not (-1 <= p.top_k < 2**31):
        raise InvalidRequest(f"top_k must be 0 or -1 (all tokens) or at least 1, got {p.top_k}.", "top_k")
    if p.seed is not None and not (-(2**63) <= p.seed < 2**63):
        raise InvalidRequest("seed must fit into 64 bits.", "seed")
    if p.max_tokens is not None and p.max_tokens < 1:
        raise InvalidRequest(f"max_tokens must be at least 1, got {p.max_tokens}.", "max_tokens")
    if p.min_tokens < 0 or (p.max_tokens is not None and p.min_tokens > p.max_tokens):
        raise InvalidRequest(f"min_tokens must be from 0 to max_tokens ({p.max_tokens}), got {p.min_tokens}.", "min_tokens")
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(p, name)
        if count is not None and not 0 <= count <= MAX_LOGPROBS:
            raise InvalidRequest(f"{name} must be from 0 to {MAX_LOGPROBS}, got {count}.", name)
    if len(p.logit_bias) > MAX_BIASED or len({token for token, _ in p.logit_bias}) < len(p.logit_bias):
        raise InvalidRequest(f"logit_bias may name at most {MAX_BIASED} tokens, each once.", "logit_bias")
    if any(not (math.isfinite(value) and -100.0 <= value <= 100.0) for _, value in p.logit_bias):
        raise InvalidRequest("Every value of logit_bias must be a number from -100 to 100.", "logit_bias")
    if p.allowed_token_ids is not None and not p.allowed_token_ids:
        raise InvalidRequest("allowed_token_ids is empty, so no token could come; leave it out.", "allowed_token_ids")
    if len(p.bad_words) > MAX_BAD_WORDS or any(not word.strip() for word in p.bad_words):
        raise InvalidRequest(f"bad_words may hold at most {MAX_BAD_WORDS} words, none of them empty.", "bad_words")
    if any(not ids for ids in p.bad_word_ids):
        raise InvalidRequest("bad_word_ids must not hold an empty word.", "bad_words")
    if sum(map(len, p.bad_words)) > MAX_STOP_CHARS:
        raise InvalidRequest(f"bad_words may hold at most {MAX_STOP_CHARS} characters in all.", "bad_words")
    if any(not s for s in p.stop):
        raise InvalidRequest("stop must not hold an empty string.", "stop")
    if sum(map(len, p.stop)) > MAX_STOP_CHARS:
        raise InvalidRequest(f"stop may hold at most {MAX_STOP_CHARS} characters in all.", "stop")
    if any(not 0 <= t < 2**31 for t in p.stop_token_ids):
        raise InvalidRequest("stop_token_ids must be token ids, which are not negative.", "stop_token_ids")


class GenerateRequest(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One sequence to generate, as the engine takes it: tokens in, tokens out.

    ``prior_output_ids`` are tokens generated before (a replay after a crash): they count as output, not as prompt; of the
    prompt's logprobs, the first ``prior_prompt_logprobs`` were told then. ``fork_of``
    names a running request of the same tokens whose blocks may be shared (n > 1, beams). ``sampling.seed`` and
    ``sampling.max_tokens`` are set by the face that accepted the request.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    arrival_s: float  # time.monotonic() of the machine; comparable across its processes
    prior_output_ids: tuple[int, ...] = ()
    prior_prompt_logprobs: int = 0
    sample_index: int = 0
    lora: str | None = None
    cache_salt: str = ""  # requests of different salts never share cached blocks
    priority: int = 0  # lower runs earlier (policy "priority")
    tenant: str = ""
    deadline_s: float | None = None
    output: Literal["text", "pooled"] = "text"
    fork_of: str | None = None
    received_s: float | None = None  # when the server had its first byte, likewise

    def __post_init__(self) -> None:
        """Refuse what no scheduler could run."""
        if not self.prompt_ids:
            raise InvalidRequest("The prompt is empty; send at least one token.", "prompt")
        if self.sampling.max_tokens is None or self.sampling.seed is None:
            raise InvalidRequest("max_tokens and seed must be set before a request reaches the engine.", "max_tokens")


# ----------------------------------------------------------------------------------------------------------------------
# Scheduler -> Runner -> Scheduler
# ----------------------------------------------------------------------------------------------------------------------


class NewRow(msgspec.Struct, frozen=True, gc=False):
    """A sequence takes a row: everything the runner must know of it, sent once (again after a preemption)."""

    uid: int
    row: int
    token_ids: tuple[int, ...]  # prompt and what was generated so far
    num_prompt: int
    sampling: SamplingParams
    seed: int
    sample_index: int
    lora_slot: int
    block_ids: BlockIds  # every block held now
    computed: int  # tokens whose K/V is in those blocks already


class RowWork(msgspec.Struct, frozen=True, gc=False):
    """What one row does in one step: the difference to the step before.

    It carries no position: with drafts and overlap only the device knows it. ``draft_ids`` come from proposers on the host;
    with a proposer on the device it stays empty and ``num_tokens`` alone says how many positions are verified.
    """

    uid: int
    row: int
    num_tokens: int
    new_block_ids: BlockIds = ()
    draft_ids: tuple[int, ...] = ()
    wants: int = 0  # WANT_* bits
    forced_ids: tuple[int, ...] = ()  # tokens that follow the row's known ones for certain; among ``num_tokens``


class CopyBlock(msgspec.Struct, frozen=True, gc=False):
    """A block to be copied on the device before the step reads it (a fork's tail)."""

    src: int
    dst: int
    group: int = 0


class SharedPrefix(msgspec.Struct, frozen=True, gc=False):
    """Running rows whose block tables of KV group 0 begin with the same ``num_blocks`` blocks, all of them full."""

    rows: tuple[int, ...]  # of the runner, rising
    num_blocks: int


class StepPlan(msgspec.Struct, frozen=True, gc=False):
    """One step, as deltas. The runner applies ``zeroed``, ``freed_rows``, ``new_rows``, ``copies`` and ``work``, in this order.

    ``shared`` is a fact about the running rows once ``new_rows`` are there, not an order and not a delta: a runner may read
    these blocks once for all rows of an entry, or take no notice. A row is in one entry at most, and may have no work in this
    step. K/V of all tokens in these blocks is there when attention reads: earlier steps wrote it, or one of the rows does in
    this step. So a row with one token sees all of them, while a chunk of a prompt may begin inside. As long as nothing
    changes, plan after plan holds the same tuple object (within one process).
    """

    step: int
    work: tuple[RowWork, ...]
    new_rows: tuple[NewRow, ...] = ()
    freed_rows: tuple[int, ...] = ()
    copies: tuple[CopyBlock, ...] = ()
    grammar_rows: tuple[int, ...] = ()  # rows whose sampling waits for a mask
    shared: tuple[SharedPrefix, ...] = ()
    zeroed: tuple[tuple[int, int], ...] = ()  # (KV group, block) in which numbers may stand that are not finite

    @property
    def num_tokens(self) -> int:
        """Tokens that the body of this step computes."""
        return sum(w.num_tokens for w in self.work)


class StepTimes(msgspec.Struct, frozen=True, gc=False):
    """When the runner began and ended a step, on time.monotonic()."""

    launched_s: float
    finished_s: float


class TokenLogprobs(msgspec.Struct, frozen=True, gc=False):
    """Logprobs at one position, of the raw logits: of the token that was chosen, and of the likeliest ones, best first."""

    logprob: float
    rank: int  # of the chosen token; 1: none was likelier
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class StepResult(msgspec.Struct, frozen=True, gc=False):
    """What a step gave, by position as in ``StepPlan.work``.

    ``tokens[i]`` holds one token for a sampled row, several when drafts were accepted, none for an unfinished chunk.
    ``bad_rows`` are positions in ``work`` whose logits were not finite. ``prompt_logprobs`` is empty where no work wants any.
    """

    step: int
    tokens: tuple[tuple[int, ...], ...]
    times: StepTimes
    bad_rows: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs | None, ...] = ()  # of each work's token, where some row asked; else empty
    prompt_logprobs: tuple[tuple[TokenLogprobs, ...], ...] = ()  # of each work, of the prompt's tokens that follow its tokens
    pooled: tuple[tuple[float, ...], ...] = ()


# ----------------------------------------------------------------------------------------------------------------------
# Engine -> faces
# ----------------------------------------------------------------------------------------------------------------------


class TokenEvent(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """New tokens of one request; the last event of a request has a ``finish_reason``."""

    id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token that ended it, if a client asked for that; ``REFUSED``; what else did
    num_cached: int = 0  # prompt tokens that were found in the prefix cache
    error: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()  # of ``token_ids``, where they were asked for
    complete: bool = False  # its grammar ended it: the last token belongs to the text, which a stop token does not
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of the prompt's tokens after those told before; the first has none


class EngineInfo(msgspec.Struct, frozen=True, gc=False, tag="ready"):
    """What the engine settled on at start; known before the first request is taken."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    device: str
    dtype: str
    weights_bytes: int
    kv_bytes: int
    workspace_bytes: int
    notes: tuple[str, ...] = ()  # choices made and why, one sentence each
    spare_bytes: int = 0  # of the process that engines are forked from, weights included that they share


class EngineHealth(msgspec.Struct, frozen=True, gc=False):
    """Whether an engine gets on with its work."""

    up: bool  # it is there, and it is not silent for longer than its work explains
    num_restarts: int = 0
    died_s: float = 0.0  # on time.monotonic(), when an engine was last found dead
    ready_s: float = 0.0  # and when the one in its place was ready


class RequestOutput(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What a face hands to its caller: new text and tokens of one request since the output before."""

    id: str
    text: str  # new text only
    token_ids: tuple[int, ...]  # new tokens only
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_prompt: int = 0
    num_output: int = 0  # tokens generated so far
    num_cached: int = 0
    error: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()  # of ``token_ids``, where they were asked for
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of the prompt's tokens after those told before; the first has none
