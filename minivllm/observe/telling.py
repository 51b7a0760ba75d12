"""An explanation in words and numbers, made of what is known of a request when somebody asks."""

from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from minivllm.observe.course import Course, Loss, Request
from minivllm.observe.explanation import MAX_BEHIND, Explanation, Phase, Preempted, Sharing, Waiting, uncovered_s
from minivllm.observe.waits import Waits

OTHERS: Final = "another key's request"
_BETWEEN: Final = "engine: between steps it told results, took in requests and planned"


def phases_of(course: Course, now_s: float) -> list[tuple[str, float, float]]:
    """Name, begin and end of each phase so far, on time.monotonic()."""
    spans = [*course.request.trail.phases, *course.phases]
    if course.ended_s is None:
        spans.append((course.state, course.since_s, max(now_s, course.since_s)))
    return spans


def tell_all(model: str, request: Request, now_s: float, waits: Waits) -> Explanation:
    """Of a request: the text that ended last says what took long."""
    each = request.courses
    last = max(each, key=lambda c: now_s if c.ended_s is None else c.ended_s)
    told = tell(model, last, now_s, waits, delivers=True)
    if len(each) == 1:
        return told
    of_prompts = [c for c in each if c.parent is None]
    return msgspec.structs.replace(
        told,
        id=request.id,
        prompt_tokens=sum(c.num_prompt for c in of_prompts),
        cached_tokens=sum(c.cached or 0 for c in of_prompts),
        output_tokens=sum(c.output_tokens for c in each),
        finish_reason=None if request.num_open else told.finish_reason,
        sequences=tuple(tell(model, c, now_s, waits, delivers=False) for c in each),
    )


def tell(model: str, course: Course, now_s: float, waits: Waits, *, delivers: bool) -> Explanation:
    """Of one text; ``delivers``: up to the end of its answer, not of the text."""
    trail, spans, first_s = course.request.trail, phases_of(course, now_s), None
    ended_s = now_s if course.ended_s is None else course.ended_s
    if delivers:
        first_s = trail.first_text_s
        if course.ended_s is not None:
            done_s = max(now_s if trail.delivered_s is None else trail.delivered_s, ended_s)
            if done_s > ended_s:
                spans.append(("deliver", ended_s, done_s))
            ended_s = done_s
    zero_s = trail.received_s
    phases = tuple(Phase(name, _us(begin_s - zero_s), _us(end_s - zero_s)) for name, begin_s, end_s in spans)
    total_s = _us(ended_s - zero_s)
    return Explanation(
        id=course.request.id if len(course.request.courses) == 1 else course.id,
        model=model,
        prompt_tokens=course.num_prompt,
        cached_tokens=course.cached or 0,
        output_tokens=course.output_tokens,
        finish_reason=course.reason,
        total_s=total_s,
        first_text_s=None if first_s is None else _us(first_s - zero_s),
        phases=phases,
        unexplained_s=_us(uncovered_s(total_s, phases)),
        waits=_waits(course, now_s, waits),
        chunks=tuple(course.chunks),
        steps=course.steps,
        shared_with=Sharing(course.shared / course.steps if course.steps else 0.0, course.most),
        preemptions=tuple(_preempted(loss, zero_s) for loss in course.losses),
    )


def _preempted(loss: Loss, zero_s: float) -> Preempted:
    away_s = None if loss.until_s is None else _us(loss.until_s - loss.at_s)
    return Preempted(_us(loss.at_s - zero_s), loss.reason, loss.by, loss.tokens, away_s)


def _waits(course: Course, now_s: float, waits: Waits) -> tuple[Waiting, ...]:
    """Its reasons, those of a wait that goes on included."""
    found = {text: (wait.seconds, wait.steps, tuple(wait.behind)) for text, wait in course.waits.items()}
    more: list[tuple[str, float, int, Sequence[str]]] = [*waits.going_on(course, now_s)]
    if course.between_s:
        more.append((_BETWEEN, course.between_s, 0, ()))
    for text, seconds, steps, behind in more:
        had_s, had, names = found.get(text, (0.0, 0, ()))
        both = tuple(dict.fromkeys([*names, *(name for name in behind if name != course.id)]))
        found[text] = (had_s + seconds, had + steps, both[:MAX_BEHIND])
    told = [
        Waiting(text.partition(":")[0], text.partition(": ")[2], _us(seconds), steps, behind)
        for text, (seconds, steps, behind) in found.items()
    ]
    return tuple(sorted(told, key=lambda wait: -wait.seconds))


def _us(seconds: float) -> float:
    """Whole microseconds: more is noise."""
    return round(seconds, 6)


def masked(told: Explanation, is_own: Callable[[str], bool]) -> Explanation:
    """The same for a tenant, who is not told the ids of others' requests."""

    def shown(name: str) -> str:
        return name if is_own(name) else OTHERS

    replace = msgspec.structs.replace
    return replace(
        told,
        waits=tuple(replace(w, behind=tuple(dict.fromkeys(map(shown, w.behind)))) for w in told.waits),
        preemptions=tuple(p if p.by is None else replace(p, by=shown(p.by)) for p in told.preemptions),
        sequences=tuple(masked(text, is_own) for text in told.sequences),
    )
