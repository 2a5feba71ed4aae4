"""Questions about one video that share their beginning get the answers that each gets alone."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models_checkpoint import save_checkpoint
from torch import Tensor

import videoanchor_triton as va
from videoanchor_triton.app import demo, pipeline
from videoanchor_triton.app.batch.shared_prefill import SharedPrefill
from videoanchor_triton.app.score_cache import ScoreCache
from videoanchor_triton.app.video.reader import VideoClip
from videoanchor_triton.app.video_model import VideoModel
from videoanchor_triton.integrations.errors import InputError
from videoanchor_triton.integrations.transformers.visual_tokens import find_multimodal_model

CONFIG = va.VideoAnchorConfig(alpha_k=9.5, alpha_v=2.5, n_clusters=3, pca_rank=8, scorer="kmeans")
QUESTIONS = ["word5 word6", "word7 word8", "word5 word6 word8 word9 word20", "word5 word7"]
N_NEW = 6


@pytest.fixture(scope="module", params=["qwen2_5_vl", "internvl", "llava_onevision"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("checkpoint")
    if request.param == "qwen2_5_vl":
        demo.make_checkpoint(folder)
    else:
        save_checkpoint(request.param, folder)
    return pipeline.load(str(folder), "cpu")


def clip(n_frames: int = 4) -> VideoClip:
    frames = np.random.default_rng(0).integers(0, 255, (n_frames, 56, 84, 3), dtype=np.uint8)
    return VideoClip(frames, np.arange(n_frames) / 2, np.arange(n_frames), n_frames, 2.0)


class Calls:
    """What a model computes: passes of the vision tower, passes of the language model that start at the first position,
    and the logits of the last position of all others."""

    def __init__(self, model: Any) -> None:
        base: Any = find_multimodal_model(model)
        tower = getattr(base, "visual", None) or base.vision_tower
        self.vision = self.whole = 0
        self.logits: list[Tensor] = []
        self._hooks = [
            tower.register_forward_hook(self._saw),
            base.language_model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end),
        ]

    def _saw(self, *_: Any) -> None:
        self.vision += 1

    def _begin(self, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs["past_key_values"]
        self.whole += cache is None or cache.get_seq_length() == 0

    def _end(self, _module: Any, _args: Any, output: Any) -> None:
        self.logits.append(output.logits[0, -1])

    def __enter__(self) -> "Calls":
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


@pytest.mark.parametrize("decode", ["persist", "prefill"])
def test_each_answer_is_that_of_a_run(loaded: tuple[Any, Any], tmp_path: Path, decode: Any) -> None:
    model, processor = loaded
    config = va.VideoAnchorConfig(**{**CONFIG.to_dict(), "decode": decode})
    with Calls(model) as one_by_one:
        alone = [pipeline.answer(model, processor, clip(), q, config, max_new_tokens=N_NEW) for q in QUESTIONS]
    cache = ScoreCache(tmp_path, 2**20)
    video = SharedPrefill(model, processor, clip(), config, max_new_tokens=N_NEW, scores=cache)
    with Calls(model) as calls:
        together = [video.answer(question) for question in QUESTIONS]
    assert (one_by_one.vision, one_by_one.whole) == (4, 4)
    assert (calls.vision, calls.whole) == (1, 1), "the video is computed once"
    assert (cache.hits, cache.misses) == (0, 1)
    ours, theirs = torch.stack(calls.logits[1:]), torch.stack(one_by_one.logits)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    n_steps = len(theirs) // len(QUESTIONS)
    for first, second in itertools.combinations(theirs[::n_steps], 2):
        assert (first - second).abs().max() > 1e-2, "the questions must show in the logits"
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.text == theirs.text
        assert ours.n_prompt_tokens == theirs.n_prompt_tokens
        assert ours.n_generated_tokens == theirs.n_generated_tokens
        assert torch.equal(ours.anchor.scores, theirs.anchor.scores)
        assert torch.equal(ours.anchor.labels, theirs.anchor.labels)
    assert together[0].seconds["vision"] > 0
    assert together[1].seconds["vision"] == together[1].seconds["ssc"] == 0


def test_the_same_in_any_order(loaded: tuple[Any, Any]) -> None:
    """No question leaves anything behind for the next one, in the cache or in the model's positions."""
    model, processor = loaded

    def logits(questions: list[str]) -> Tensor:
        video = SharedPrefill(model, processor, clip(), CONFIG, max_new_tokens=1)
        with Calls(model) as calls:
            for question in questions:
                video.answer(question)
        return torch.stack(calls.logits[1:])

    assert torch.equal(logits(QUESTIONS), logits(QUESTIONS[::-1]).flip(0))


def test_a_question_before_the_video_is_computed_whole(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = loaded
    template = processor.chat_template
    qwen = type(model).__name__.startswith("Qwen")
    parts = "<|vision_start|><|video_pad|><|vision_end|>" if qwen else " <video> "
    processor.chat_template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %} {{ part['text'] }} {% endif %}{% endfor %}{% endfor %}" + parts + " word9"
    )
    try:
        alone = [pipeline.answer(model, processor, clip(), q, CONFIG, max_new_tokens=N_NEW) for q in QUESTIONS]
        cache = ScoreCache(tmp_path, 2**20)
        video = SharedPrefill(model, processor, clip(), CONFIG, max_new_tokens=N_NEW, scores=cache)
        assert [video.answer(question).text for question in QUESTIONS] == [one.text for one in alone]
    finally:
        processor.chat_template = template
    assert cache.misses == 1, "they share the scores"


def test_whole_prompts_on_request(tmp_path: Path) -> None:
    save_checkpoint("internvl", tmp_path)
    about: dict[str, Any] = {"model": str(tmp_path), "device": "cpu", "dtype": "auto", "max_new_tokens": 2}
    model, one = VideoModel(config=CONFIG, **about), clip()
    for share, passes in ((False, 2), (True, 1)):
        model.open(replace(one), share=share)
        with Calls(model._model) as calls:
            for question in QUESTIONS[:2]:
                model.answer(question)
        assert (calls.vision, calls.whole) == (passes, passes)


def test_a_beginning_that_fails_is_not_tried_again(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = loaded
    tries = []

    def failing(*_: Any, **__: Any) -> None:
        tries.append(1)
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(find_multimodal_model(model).language_model, "forward", failing)
    video = SharedPrefill(model, processor, clip(), CONFIG)
    for question in QUESTIONS[:3]:
        with pytest.raises(InputError, match="not enough memory"):
            video.answer(question)
    assert len(tries) == 1


def test_a_question_that_does_not_fit_harms_no_other(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    video = SharedPrefill(model, processor, clip(), CONFIG, max_new_tokens=2)
    before = video.answer("word5").text
    with pytest.raises(InputError, match="the model's context holds"):
        video.answer("word5 " * 5000)
    assert video.answer("word5").text == before
