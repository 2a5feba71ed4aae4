"""Further ways of generating, against the eager model with a dense gate: greedy tokens equal, logits within 1e-4."""

import copy
from typing import Any

import pytest
import tiny_models as tiny
import torch
from dense_eager import (
    ALPHA_K,
    ALPHA_V,
    GENERATE,
    TOLERANCE,
    assert_same,
    build,
    generate_dense,
    merged_embeddings,
    merged_scores,
)
from gated_prompts import CONFIG, ONE, TWO, counting_config
from torch import Tensor
from transformers import DynamicCache

import videoanchor_triton as va


@pytest.mark.skipif(not tiny.V5, reason="transformers 4.57 cannot prefill a video in chunks")
@pytest.mark.parametrize("chunk", [3, 7])
@pytest.mark.parametrize(
    "prompts",
    [
        pytest.param(ONE, id="batch-1"),
        pytest.param(TWO, id="left-padded"),
        pytest.param([[3, "V", 5, "V", 6], [7, 8, 9], [4, "V", 2]], id="row-without-video"),
    ],
)
def test_chunked_prefill(backbone: tuple[str, Any], prompts: list[tiny.Prompt], chunk: int) -> None:
    """The whole video is scored once, before its first chunk."""
    name, model = backbone
    batch = tiny.inputs(name, prompts)
    expected = generate_dense(model, batch, merged_scores(model, batch))
    config, scorer = counting_config()
    with va.enable(model, config):
        out = model.generate(**batch, **GENERATE, prefill_chunk_size=chunk)
    assert_same(out, expected)
    assert scorer.calls == sum("V" in prompt for prompt in prompts)


@pytest.mark.skipif(not tiny.V5, reason="transformers 4.57 drops the pixels of a second turn")
def test_chunked_prefill_of_a_second_turn() -> None:
    model = build("internvl")
    first, second = tiny.inputs("internvl", [[3, 4, "V", 5]]), tiny.inputs("internvl", [[11, "V", 12, 13]], seed=6)

    def turns(**options: Any) -> Any:
        cache = DynamicCache()
        with va.enable(model, CONFIG):
            answer = model.generate(**first, **GENERATE, past_key_values=cache).sequences
            ids = torch.cat([answer, second["input_ids"]], 1)
            turn = {**second, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            return model.generate(**turn, **GENERATE, past_key_values=cache, **options)

    assert_same(turns(prefill_chunk_size=4), turns())


def test_chunked_prefill_is_refused_where_transformers_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen2_5_vl")

    def forward(input_ids: Tensor, pixel_values_videos: Tensor) -> None: ...  # takes no mm_encoder_outputs

    monkeypatch.setattr(model, "forward", forward)
    with va.enable(model, CONFIG), pytest.raises(NotImplementedError, match="upgrade transformers"):
        model.generate(**tiny.inputs("qwen2_5_vl", ONE), **GENERATE, prefill_chunk_size=4)


def test_prompt_lookup(backbone: tuple[str, Any]) -> None:
    name, model = backbone
    batch = tiny.inputs(name, [[3, 4, "V", 5, 3, 4, 5, 3, 4, 5]])
    model.generation_config.eos_token_id = tiny.VISION_END  # 4.57 needs one; it is suppressed
    expected = generate_dense(model, batch, merged_scores(model, batch), max_new_tokens=12)
    with va.enable(model, CONFIG):
        out = model.generate(**batch, **{**GENERATE, "max_new_tokens": 12}, prompt_lookup_num_tokens=3)
    assert_same(out, expected)


@pytest.mark.parametrize("assistant_enabled", [False, True])
def test_assisted_decoding(backbone: tuple[str, Any], assistant_enabled: bool) -> None:
    name, model = backbone
    assistant = build(name, seed=0)
    batch = tiny.inputs(name, ONE)
    expected = generate_dense(model, batch, merged_scores(model, batch), max_new_tokens=12)
    handle = va.enable(assistant, CONFIG) if assistant_enabled else None
    with va.enable(model, CONFIG):
        out = model.generate(**batch, **{**GENERATE, "max_new_tokens": 12}, assistant_model=assistant)
    assert_same(out, expected)
    if handle is not None:
        handle.disable()


def test_several_return_sequences(backbone: tuple[str, Any]) -> None:
    name, model = backbone
    if name in ("internvl", "qwen3_vl") and not tiny.V5:
        pytest.skip("beams of InternVL and Qwen3-VL are broken in transformers 4.57, ungated too")
    batch = tiny.inputs(name, TWO)
    scores = merged_scores(model, batch).repeat_interleave(3, 0)
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2}
    expected = generate_dense(model, batch, scores, **options)
    config, scorer = counting_config()
    with va.enable(model, config):
        out = model.generate(**batch, **GENERATE, **options)
    assert_same(out, expected)
    assert scorer.calls == 2


def test_without_a_cache(backbone: tuple[str, Any]) -> None:
    """Every step sees the whole prompt again; it is scored once."""
    name, model = backbone
    batch = tiny.inputs(name, ONE)
    expected = generate_dense(model, batch, merged_scores(model, batch))
    config, scorer = counting_config()
    with va.enable(model, config):
        out = model.generate(**batch, **GENERATE, use_cache=False)
        assert scorer.calls == 1
        model(**batch, use_cache=False)
        assert scorer.calls == 2, "nothing is kept when generate() is over"
    assert_same(out, expected)


class _NoStream:
    """Stands for a CUDA stream where there is none: the layers still go through the offloading path."""

    def wait_stream(self, other: Any) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


def test_offloaded_cache(backbone: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        for name in ("torch.Stream", "torch.cuda.Stream", "torch.cuda.default_stream"):
            monkeypatch.setattr(name, lambda *_args: _NoStream())
        monkeypatch.setattr("torch.cuda.stream", lambda _stream: _NoStream())
    name, model = backbone
    batch = tiny.inputs(name, TWO)
    expected = generate_dense(model, batch, merged_scores(model, batch))
    cache = DynamicCache(config=model.config.get_text_config(), offloading=True)
    with va.enable(model, CONFIG):
        out = model.generate(**batch, **GENERATE, past_key_values=cache)
    assert_same(out, expected)


def test_static_cache_with_sliding_windows() -> None:
    model = build("internvl", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    batch = tiny.inputs("internvl", TWO)
    with va.enable(model, CONFIG):
        expected = model.generate(**batch, **GENERATE)
        out = model.generate(**batch, **GENERATE, cache_implementation="static", disable_compile=True)
        short = {key: value[:1, :5] if key != "pixel_values" else value for key, value in batch.items()}
        del short["pixel_values"]  # shorter than the window, which fills up while decoding
        options = {**GENERATE, "max_new_tokens": 9}
        expected_short = model.generate(**short, **options)
        out_short = model.generate(**short, **options, cache_implementation="static", disable_compile=True)
    assert_same(out, expected)
    assert_same(out_short, expected_short)


@pytest.mark.parametrize("name", ["internvl", "llava_onevision"])
def test_embeddings_with_pixels(name: str) -> None:
    """Placeholders are known by their embeddings, as transformers itself knows them."""
    model = build(name)
    batch = tiny.inputs(name, TWO)
    with va.enable(model, CONFIG), torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        embeds = model.get_input_embeddings()(batch.pop("input_ids"))
        out = model(**batch, inputs_embeds=embeds, use_cache=False).logits
    torch.testing.assert_close(out, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=["greedy", "beams", "no-cache"])
def test_merged_embeddings_with_given_scores(options: dict[str, Any]) -> None:
    name = "llava_onevision"
    model = build(name)
    batch = tiny.inputs(name, TWO)
    scores = merged_scores(model, batch)
    expected = generate_dense(model, batch, scores.repeat_interleave(options.get("num_beams", 1), 0), **options)
    embeds = merged_embeddings(model, batch)
    config, scorer = counting_config()
    with va.enable(model, config) as handle:
        with handle.use_scores(scores):
            out = model.generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"], **GENERATE, **options)
        with pytest.raises(ValueError, match="use_scores"):
            model.generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"], **GENERATE)
    assert scorer.calls == 0
    for ours, dense in zip(out.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, dense, atol=TOLERANCE, rtol=0)


def test_given_scores_are_used_instead_of_scoring(backbone: tuple[str, Any]) -> None:
    name, model = backbone
    batch = tiny.inputs(name, TWO)
    scores = torch.rand(batch["input_ids"].shape)
    expected = generate_dense(model, batch, scores)
    config, scorer = counting_config()
    with va.enable(model, config) as handle, handle.use_scores(scores):
        out = model.generate(**batch, **GENERATE)
    assert_same(out, expected)
    assert scorer.calls == 0


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        (torch.zeros(3), "floating-point tensor"),
        (torch.zeros(2, 3, dtype=torch.int64), "floating-point tensor"),
        (torch.full((2, 3), 1.5), r"in \[0, 1\]"),
        (torch.full((2, 3), float("nan")), r"in \[0, 1\]"),
    ],
    ids=["1-d", "integers", "above-1", "nan"],
)
def test_given_scores_that_are_none(scores: Tensor, said: str) -> None:
    with va.enable(build("internvl"), CONFIG) as handle, pytest.raises(ValueError, match=said):
        handle.use_scores(scores).__enter__()


def test_given_scores_of_another_batch() -> None:
    model = build("internvl")
    wrong = pytest.raises(ValueError, match="3 rows for a batch of 2")
    with va.enable(model, CONFIG) as handle, handle.use_scores(torch.zeros(3, 9)), wrong:
        model.generate(**tiny.inputs("internvl", TWO), **GENERATE)


@pytest.mark.parametrize("name", ["internvl", "llava_onevision"])
def test_packed_sequences(name: str) -> None:
    """Two prompts in one row, told apart by their positions: each as if it were alone."""
    model = build(name)
    first, second = tiny.inputs(name, ONE), tiny.inputs(name, [[7, 8, "V", 9, 10]], seed=6)
    rows = [first, second]
    packed = {
        key: torch.cat([row[key] for row in rows], 1 if key == "input_ids" else 0)
        for key in first
        if key != "attention_mask"
    }
    packed["position_ids"] = torch.cat([torch.arange(row["input_ids"].shape[1]) for row in rows])[None]
    separate = va.VideoAnchorConfig(alpha_k=ALPHA_K, alpha_v=ALPHA_V, scorer=_scores_of_each_video)
    with va.enable(model, separate), torch.no_grad():
        expected = torch.cat([model(**row, use_cache=False).logits for row in rows], 1)
        out = model(**packed, use_cache=False).logits
    torch.testing.assert_close(out, expected, atol=TOLERANCE, rtol=0)


def _scores_of_each_video(tokens: Tensor) -> Tensor:
    return torch.sin(1000 * tokens.float().sum(-1)).square()  # of each token by itself


@pytest.mark.parametrize("method", ["reorder_cache", "batch_select_indices"])
def test_rows_of_a_cache_are_reordered_with_their_scores(backbone: tuple[str, Any], method: str) -> None:
    name, model = backbone
    batch = tiny.inputs(name, TWO)
    n = batch["input_ids"].shape[1]
    rows = torch.tensor([1, 0])
    text = torch.tensor([[20, 21], [22, 23]])
    positions = torch.arange(n, n + 2).expand((3, 2, 2) if name.startswith("qwen") else (2, 2))
    later: dict[str, Any] = (
        {"position_ids": positions}
        if tiny.V5
        else {"position_ids": positions, "cache_position": torch.arange(n, n + 2)}
    )
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 2), value=1)

    def continued(reorder: bool) -> Tensor:
        cache = model(**batch, past_key_values=DynamicCache(), use_cache=True).past_key_values
        order = rows if reorder else torch.tensor([0, 1])
        if reorder:
            getattr(cache, method)(rows)
        step = {"input_ids": text[order], "attention_mask": mask[order], **later}
        return model(**step, past_key_values=cache, use_cache=True).logits

    with va.enable(model, CONFIG), torch.no_grad():
        torch.testing.assert_close(continued(True), continued(False)[rows], atol=TOLERANCE, rtol=0)


def test_rows_of_a_cache_are_repeated_with_their_scores() -> None:
    model = build("internvl")
    batch = tiny.inputs("internvl", TWO)
    with va.enable(model, CONFIG), torch.no_grad():
        cache = model(**batch, past_key_values=DynamicCache(), use_cache=True).past_key_values
        one, repeated = copy.deepcopy(cache), copy.deepcopy(cache)
        repeated.batch_repeat_interleave(2)
        assert isinstance(repeated, DynamicCache)
        text = torch.tensor([[20, 21], [22, 23]])
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, 2), value=1)
        n = batch["input_ids"].shape[1]
        later = {} if tiny.V5 else {"cache_position": torch.arange(n, n + 2)}
        expected = model(input_ids=text, attention_mask=mask, past_key_values=one, use_cache=True, **later).logits
        text, mask = text.repeat_interleave(2, 0), mask.repeat_interleave(2, 0)
        out = model(input_ids=text, attention_mask=mask, past_key_values=repeated, use_cache=True, **later).logits
        torch.testing.assert_close(out, expected.repeat_interleave(2, 0), atol=TOLERANCE, rtol=0)
        for layer in cache.layers:  # behind the cache's back
            layer.batch_repeat_interleave(2)
        with pytest.raises(ValueError, match="scores of 2 rows, the batch has 4"):
            model(input_ids=text, attention_mask=mask, past_key_values=cache, use_cache=True, **later)
