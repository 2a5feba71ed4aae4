"""Several threads with one model, and a prompt that is interrupted."""

import threading
from typing import Any

import pytest
import tiny_models as tiny
import torch
from dense_eager import ALPHA_K, ALPHA_V, GENERATE, assert_same, build, generate_dense, merged_scores, pseudo_scores
from gated_prompts import CONFIG, counting_config
from torch import Tensor

import videoanchor_triton as va


def test_two_threads_on_one_model() -> None:
    """Each thread's prompt keeps its own scores. InternVL keeps nothing of a prompt on the model."""
    model = build("internvl")
    batches = [tiny.inputs("internvl", [[3, 4, "V", 5, 6]], seed=5), tiny.inputs("internvl", [["V", 9, 7]], seed=6)]
    expected = [generate_dense(model, batch, merged_scores(model, batch)) for batch in batches]
    both_scoring = threading.Barrier(2, timeout=60)

    def meeting(tokens: Tensor) -> Tensor:
        both_scoring.wait()
        return pseudo_scores(tokens)

    config = va.VideoAnchorConfig(alpha_k=ALPHA_K, alpha_v=ALPHA_V, scorer=meeting)
    outputs: dict[int, Any] = {}

    def run(index: int) -> None:
        outputs[index] = model.generate(**batches[index], **GENERATE)

    with va.enable(model, config):
        threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index in range(2):
        assert_same(outputs[index], expected[index])


def test_two_threads_in_one_forward_each() -> None:
    """Each thread's visual positions are its own, also while both are between the prompt and the decoder."""
    model = build("internvl")
    batches = [tiny.inputs("internvl", [[3, 4, "V", 5, 6]], seed=5), tiny.inputs("internvl", [["V", 9, 7]], seed=6)]
    both_seeing = threading.Barrier(2, timeout=60)
    outputs: dict[int, Tensor] = {}

    def meet(*_args: Any) -> None:
        both_seeing.wait()

    def run(index: int) -> None:
        with torch.no_grad():
            outputs[index] = model(**batches[index], use_cache=False).logits

    with va.enable(model, CONFIG):
        for index in range(2):
            run(index)
        expected = dict(outputs)
        hook = model.base_model.vision_tower.register_forward_pre_hook(meet)
        threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
        outputs.clear()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        hook.remove()
    for index in range(2):
        torch.testing.assert_close(outputs[index], expected[index])


def test_interrupt_leaves_nothing_stale() -> None:
    """KeyboardInterrupt passes by the hooks that run after a failed forward."""
    model = build("internvl")
    batch, text = tiny.inputs("internvl", [["V", 5]]), tiny.inputs("internvl", [list(range(3, 3 + 16))])
    assert text["input_ids"].shape == batch["input_ids"].shape

    def interrupt(*_args: Any) -> None:
        raise KeyboardInterrupt

    config, scorer = counting_config()
    with va.enable(model, config), torch.no_grad():
        hook = model.base_model.vision_tower.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**batch)
        hook.remove()
        model(**text)
    assert scorer.calls == 0


def test_given_scores_reach_a_thread_of_the_block(internvl: tuple[Any, dict[str, Tensor]]) -> None:
    """As a streamer's generate() runs; not a thread that ran before."""
    model, batch = internvl
    scores = torch.rand(batch["input_ids"].shape)
    expected, own = generate_dense(model, batch, scores), generate_dense(model, batch, merged_scores(model, batch))
    out: dict[str, Any] = {}
    opened, done = threading.Event(), threading.Event()

    def run(name: str) -> None:
        if name == "older":
            opened.wait(60)
        out[name] = model.generate(**batch, **GENERATE)
        done.set()

    older = threading.Thread(target=run, args=("older",))
    older.start()
    with va.enable(model, CONFIG) as handle, handle.use_scores(scores):
        streamer = threading.Thread(target=run, args=("streamer",))
        streamer.start()
        streamer.join()
        opened.set()
        older.join()
    assert_same(out["streamer"], expected)
    assert_same(out["older"], own)


def test_thread_that_two_blocks_may_have_started(internvl: tuple[Any, dict[str, Tensor]]) -> None:
    model, batch = internvl
    scores = torch.rand(batch["input_ids"].shape)
    opened, close = threading.Event(), threading.Event()
    said: list[str] = []

    def other() -> None:
        with handle.use_scores(scores):
            opened.set()
            close.wait(60)

    def third() -> None:
        try:
            model.generate(**batch, **GENERATE)
        except RuntimeError as error:
            said.append(str(error))

    with va.enable(model, CONFIG) as handle, handle.use_scores(scores):
        threads = [threading.Thread(target=other)]
        threads[0].start()
        opened.wait(60)
        threads.append(threading.Thread(target=third))
        threads[1].start()
        threads[1].join()
        close.set()
        threads[0].join()
    assert len(said) == 1
    assert "several threads" in said[0]
