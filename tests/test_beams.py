"""Beam search: the texts of a search written down word for word over full logits, and nothing left behind."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from minivllm.beams import BeamSearch, BeamSearchParams
from minivllm.errors import ContextTooLong, InvalidRequest
from minivllm.llm import LLM
from minivllm.types import TokenLogprobs

PROMPTS = [[3, 5, 7, 11, 13], [17, 90], list(range(20, 60))]
ENDS = tuple(range(100, 130))  # many tokens end a text, so that a search meets them
OPTIONS: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "max_num_seqs": 8, "num_gpu_blocks_override": 80}


@pytest.fixture(params=[True, False], ids=["cached", "no cache"])
def made(
    tiny_model: Callable[[str], tuple[Path, Any]], bundled_model: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> tuple[LLM, Any]:
    folder, model = tiny_model("llama-gqa")
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "eos_token_id": list(ENDS)}))
    (tmp_path / "model" / "generation_config.json").unlink(missing_ok=True)
    options = {**OPTIONS, "device": "cpu", "enable_prefix_caching": request.param}
    return LLM(str(tmp_path / "model"), tokenizer=str(bundled_model), **options), model


def reference(model: Any, prompt: Sequence[int], p: BeamSearchParams) -> list[tuple[float, list[int], float]]:
    """Score, tokens and sum of logprobs of the best texts: as vLLM searches, over whole logits and without an early end."""
    width, beams, done = p.beam_width, [(list(prompt), 0.0)], []

    def score(tokens: list[int], total: float, ended: bool) -> float:
        return total / (len(tokens) - ended) ** p.length_penalty

    for _ in range(p.max_tokens):
        grown: list[tuple[list[int], float]] = []
        if not beams:
            break
        with torch.inference_mode():
            every = model(torch.tensor([tokens for tokens, _ in beams])).logits[:, -1].double().log_softmax(-1)
        for (tokens, total), exact in zip(beams, every, strict=True):
            values, ids = exact.sort(descending=True, stable=True)
            for token, value in zip(ids[: 2 * width].tolist(), values.tolist(), strict=False):
                longer = ([*tokens, token], total + value)
                if token in ENDS and not p.ignore_eos:
                    done.append((score(*longer, True), longer[0][len(prompt) :], longer[1]))
                else:
                    grown.append(longer)
        beams = sorted(grown, key=lambda beam: score(*beam, False), reverse=True)[:width]
    done += [(score(*beam, False), beam[0][len(prompt) :], beam[1]) for beam in beams]
    return sorted(done, key=lambda text: text[0], reverse=True)[:width]


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.5, -1.0])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_as_a_search_over_whole_logits(made: tuple[LLM, Any], width: int, length_penalty: float) -> None:
    llm, model = made
    early = 0
    for ignore_eos in (False, True):
        p = BeamSearchParams(
            beam_width=width, max_tokens=7, length_penalty=length_penalty, ignore_eos=ignore_eos, logprobs=3
        )
        for prompt, texts in zip(PROMPTS, llm.beam_search(PROMPTS, p), strict=True):
            expected = reference(model, prompt, p)
            assert [text.token_ids for text in texts] == [tokens for _, tokens, _ in expected]
            for text, (_, tokens, total) in zip(texts, expected, strict=True):
                assert text.prompt_ids == tuple(prompt)
                assert sum(found.logprob for found in text.logprobs) == pytest.approx(total, abs=1e-4)
                assert all(len(found.top_ids) == 3 for found in text.logprobs)
                ended = tokens[-1] in ENDS and not ignore_eos
                assert text.finish_reason == ("stop" if ended else "length") and (ended or len(tokens) == 7)
                early += ended
    assert early > 0 or width == 1
    assert llm.engine._scheduler._kv.counts().referenced == 0


def test_a_search_is_over_when_nothing_better_can_come(made: tuple[LLM, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same texts in fewer steps than ``max_tokens``."""
    llm, model = made
    steps: list[int] = []
    generate = llm.generate
    monkeypatch.setattr(llm, "generate", lambda asked, params: steps.append(len(asked)) or generate(asked, params))
    p = BeamSearchParams(beam_width=3, max_tokens=60, length_penalty=0.0)
    (texts,) = llm.beam_search(PROMPTS[:1], p)
    assert [text.token_ids for text in texts] == [tokens for _, tokens, _ in reference(model, PROMPTS[0], p)]
    assert steps[0] == 1 and len(steps) < 60 and max(steps) == 3


def test_beams_share_their_blocks(made: tuple[LLM, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step computes at most a block of each beam where prompts are cached, whatever came before."""
    llm, _ = made
    computed: list[int] = []
    step = llm.engine.step

    def counting() -> Any:
        message = step()
        if message is not None and message.record is not None:
            computed.append(message.record.num_prompt_tokens)
        return message

    monkeypatch.setattr(llm.engine, "step", counting)
    llm.beam_search([PROMPTS[2]], BeamSearchParams(beam_width=4, max_tokens=20, ignore_eos=True))
    cached = llm.config.cache.enable_prefix_caching
    assert max(computed[1:]) <= 4 * 16 if cached else max(computed[1:]) > 4 * 40


def test_the_text_shows_its_end_on_request(made: tuple[LLM, Any]) -> None:
    llm, _ = made
    shown: dict[bool, list[str]] = {}
    for include in (False, True):
        p = BeamSearchParams(
            beam_width=4, max_tokens=7, length_penalty=0.0, include_stop_str_in_output=include, skip_special_tokens=False
        )
        (texts,) = llm.beam_search(PROMPTS[:1], p)
        ended = [text for text in texts if text.finish_reason == "stop"]
        for text in ended:
            whole = llm.tokenizer.decode(text.token_ids if include else text.token_ids[:-1])
            assert text.text.strip() == whole.strip()
        shown[include] = [text.text for text in ended]
    assert shown[True] and shown[True] != shown[False]


def test_ranges(made: tuple[LLM, Any]) -> None:
    for more, param in (
        ({"beam_width": 0}, "n"), ({"beam_width": 11}, "n"), ({"max_tokens": 0}, "max_tokens"), ({"logprobs": 21}, "logprobs"),
        ({"length_penalty": float("nan")}, "length_penalty"), ({"length_penalty": 11.0}, "length_penalty"),
    ):  # fmt: skip
        with pytest.raises(InvalidRequest) as caught:
            BeamSearchParams(**{"beam_width": 2, "max_tokens": 3, **more})
        assert caught.value.param == param
    with pytest.raises(ContextTooLong):
        made[0].beam_search(PROMPTS, BeamSearchParams(beam_width=2, max_tokens=230))
    with pytest.raises(InvalidRequest, match="max-logprobs"):
        BeamSearchParams(beam_width=4, max_tokens=3).check(5, 100, 7)


def test_ends_and_equals() -> None:
    """Hand-made logprobs: of equal ways the one that came first, texts that end give their places to others."""
    p = BeamSearchParams(beam_width=2, max_tokens=3, length_penalty=0.0)
    search = BeamSearch([7], p, [0])
    tops = TokenLogprobs(0.0, 1, (0, 1, 2, 3), (-0.5, -1.0, -1.0, -2.0))
    assert search.asks == [(7,)]
    search.take([tops])
    assert search.asks == [(7, 1), (7, 2)]
    search.take([tops, tops])
    assert [beam.token_ids for beam in search.best()] == [(0,), (1, 0)]
    assert search.asks == [], "what is open has a lower sum than both texts that ended, and sums only fall"
