"""generate() with the gate against an eager model that materialises it: same greedy tokens, logits within 1e-4 in
fp32."""

import copy
from typing import Any

import dense_eager
import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
from dense_eager import (
    ALPHA_K,
    ALPHA_Q,
    ALPHA_V,
    GENERATE,
    TOLERANCE,
    assert_same,
    generate_dense,
    merged_scores,
    pseudo_scores,
)
from gated_prompts import TWO
from largest_square import LargestSquare
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache

import videoanchor_triton as va


def config(**options: Any) -> va.VideoAnchorConfig:
    return va.VideoAnchorConfig(alpha_q=ALPHA_Q, alpha_k=ALPHA_K, alpha_v=ALPHA_V, scorer=pseudo_scores, **options)


@pytest.mark.parametrize("decode", ["persist", "prefill"])
@pytest.mark.parametrize(
    "prompts",
    [
        pytest.param([[3, 4, "V", 5, 6]], id="batch-1"),
        pytest.param(TWO, id="left-padded"),
        pytest.param([[3, "V", 5, "V", 6]], id="two-videos"),
        pytest.param([[3, "V", 5, "V", 6], [7, 8, 9], [4, "V", 2]], id="row-without-video"),
    ],
)
def test_matches_dense_gate(backbone: tuple[str, Any], prompts: list[tiny.Prompt], decode: str) -> None:
    name, model = backbone
    batch = tiny.inputs(name, prompts)
    scores = merged_scores(model, batch)
    expected = generate_dense(model, batch, scores, decode)
    ungated = model.generate(**batch, **GENERATE)
    with va.enable(model, config(decode=decode)) as handle:
        assert model.config.text_config._attn_implementation == "videoanchor_triton"
        assert model.config.vision_config._attn_implementation == "sdpa"
        out = model.generate(**batch, **GENERATE)
    assert_same(out, expected)
    assert (out.logits[0] - ungated.logits[0]).abs().max() > 1e-2, "the gate must show in the logits"
    visual = torch.isin(batch["input_ids"], torch.tensor([tiny.IMAGE, tiny.VIDEO]))
    for row, result in enumerate(handle.last):
        if not visual[row].any():
            assert result is None
        else:
            assert result is not None
            torch.testing.assert_close(result.scores, scores[row, visual[row]])
    again = model.generate(**batch, **GENERATE)
    assert torch.equal(torch.stack(again.logits), torch.stack(ungated.logits)), "disable() must restore the model"


def test_matches_dense_gate_with_subspace_scores(backbone: tuple[str, Any]) -> None:
    name, model = backbone
    batch = tiny.inputs(name, TWO)
    settings = va.VideoAnchorConfig(alpha_k=ALPHA_K, alpha_v=ALPHA_V, n_clusters=3, pca_rank=6)
    with va.enable(model, settings) as handle:
        out = model.generate(**batch, **GENERATE)
    visual = torch.isin(batch["input_ids"], torch.tensor([tiny.IMAGE, tiny.VIDEO]))
    scores = torch.zeros(visual.shape)
    for row, result in enumerate(handle.last):
        assert result is not None
        scores[row, visual[row]] = result.scores
    assert (scores.max(1).values > 0.9).all()
    assert_same(out, generate_dense(model, batch, scores))


@pytest.mark.parametrize("decode", ["persist", "prefill"])
def test_bf16_stays_near_fp32(decode: Any) -> None:
    """The gate in bf16 is off from fp32 by no more than twice what the dense eager model is."""
    model = tiny.build("qwen2_5_vl")
    batch = tiny.inputs("qwen2_5_vl", TWO)
    scores = merged_scores(model, batch)
    exact = generate_dense(model, batch, scores, decode, max_new_tokens=1).logits[0]
    model = model.to(torch.bfloat16)
    eager = generate_dense(model, batch, scores, decode, max_new_tokens=1).logits[0]
    visual = torch.isin(batch["input_ids"], torch.tensor([tiny.IMAGE, tiny.VIDEO]))
    picks = iter([scores[row, visual[row]] for row in range(len(scores))])
    given = va.VideoAnchorConfig(alpha_k=ALPHA_K, alpha_v=ALPHA_V, scorer=lambda _tokens: next(picks), decode=decode)
    with va.enable(model, given):
        ours = model.generate(**batch, **{**GENERATE, "max_new_tokens": 1}).logits[0]
    assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max()


def test_beams_share_one_score(backbone: tuple[str, Any]) -> None:
    name, model = backbone
    if name in ("internvl", "qwen3_vl") and not tiny.V5:
        pytest.skip("beams of InternVL and Qwen3-VL are broken in transformers 4.57, ungated too")
    batch = tiny.inputs(name, TWO)
    scores = merged_scores(model, batch)
    expected = generate_dense(model, batch, scores.repeat_interleave(3, 0), num_beams=3)
    with va.enable(model, config()) as handle:
        out = model.generate(**batch, **GENERATE, num_beams=3)
    assert_same(out, expected)
    assert len(handle.last) == 6
    assert handle.last[0] is handle.last[1] is handle.last[2]
    assert handle.last[3] is not handle.last[2]


def test_static_cache(backbone: tuple[str, Any]) -> None:
    name, model = backbone
    batch = tiny.inputs(name, TWO)
    scores = merged_scores(model, batch)
    expected = generate_dense(model, batch, scores)
    with va.enable(model, config()):
        out = model.generate(**batch, **GENERATE, cache_implementation="static", disable_compile=True)
    assert_same(out, expected)


@pytest.mark.skipif(tiny.V5, reason="test_compiled.py asks more of a later transformers")
def test_compiled_decode_is_one_graph(backbone: tuple[str, Any]) -> None:
    name, model = backbone
    batch = tiny.inputs(name, TWO)
    expected = generate_dense(model, batch, merged_scores(model, batch))
    compile_config = CompileConfig(backend="eager", mode=None)  # pyright: ignore[reportArgumentType]
    # generate() compiles on a GPU only, unless told so
    compile_config._compile_all_devices = True  # pyright: ignore[reportAttributeAccessIssue]
    torch._dynamo.reset()
    counters.clear()
    with va.enable(model, config()):
        out = model.generate(**batch, **GENERATE, cache_implementation="static", compile_config=compile_config)
    assert_same(out, expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_right_padded_forward(backbone: tuple[str, Any]) -> None:
    name, model = backbone
    batch = tiny.inputs(name, TWO, left_pad=False)
    scores = merged_scores(model, batch)
    model.set_attn_implementation("dense_eager")
    dense_eager.state.update(scores=scores, decode="persist")
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
    dense_eager.state["scores"] = None
    model.set_attn_implementation("sdpa")
    with va.enable(model, config()), torch.no_grad():
        out = model(**batch, use_cache=False).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(out[real], expected[real], atol=TOLERANCE, rtol=0)


def test_cache_made_by_the_model_keeps_the_scores(backbone: tuple[str, Any]) -> None:
    name, model = backbone
    batch = tiny.inputs(name, [[3, 4, "V", 5, 6]])
    scores = merged_scores(model, batch)
    expected = generate_dense(model, batch, scores, max_new_tokens=2)
    with va.enable(model, config()), torch.no_grad():
        first = model(**batch, use_cache=True)
        token = expected.sequences[:, batch["input_ids"].shape[1]][:, None]
        n = batch["input_ids"].shape[1]
        extra = {} if tiny.V5 else {"cache_position": torch.tensor([n])}
        second = model(input_ids=token, past_key_values=first.past_key_values, use_cache=True, **extra)
    torch.testing.assert_close(first.logits[:, -1], expected.logits[0], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(second.logits[:, -1], expected.logits[1], atol=TOLERANCE, rtol=0)


def _second_turn(batch: dict[str, Tensor], answer: Tensor, follow_up: list[int]) -> dict[str, Tensor]:
    ids = torch.cat([answer, torch.tensor([follow_up])], 1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in batch:
        types = batch["mm_token_type_ids"]
        turn["mm_token_type_ids"] = F.pad(types, (0, ids.shape[1] - types.shape[1]))
    return turn


def test_second_turn_on_a_kept_cache(backbone: tuple[str, Any]) -> None:
    """The scores stay with the cache: a follow-up question attends to the video through the gate, text has score 0."""
    name, model = backbone
    batch = tiny.inputs(name, [[3, 4, "V", 5]])
    scores = merged_scores(model, batch)

    def turns(generate: Any) -> Any:
        cache = DynamicCache()
        answer = generate(batch, past_key_values=cache, max_new_tokens=3).sequences
        return generate(_second_turn(batch, answer, [11, 12, 13]), past_key_values=cache)

    expected = turns(lambda turn, **options: generate_dense(model, turn, scores, **options))
    calls = []

    def counting(tokens: Tensor) -> Tensor:
        calls.append(len(tokens))
        return pseudo_scores(tokens)

    with va.enable(model, va.VideoAnchorConfig(alpha_k=ALPHA_K, alpha_v=ALPHA_V, scorer=counting)):
        out = turns(lambda turn, **options: model.generate(**turn, **{**GENERATE, **options}))
    assert_same(out, expected)
    assert len(calls) == 1, "the video is scored once"


@pytest.mark.skipif(not tiny.V5, reason="transformers 4.57 drops the pixels of a second turn")
@pytest.mark.parametrize("name", ["internvl", "llava_onevision"])
def test_second_video_in_a_second_turn(name: str) -> None:
    """Each video is scored by itself and keeps its place in the cache."""
    model = tiny.build(name)
    model.set_attn_implementation("sdpa")
    first = tiny.inputs(name, [[3, 4, "V", 5]])
    second = tiny.inputs(name, [[11, "V", 12, 13]], seed=6)
    first_scores, second_scores = merged_scores(model, first), merged_scores(model, second)

    def turns(generate: Any) -> Any:
        cache = DynamicCache()
        answer = generate(first, first_scores, past_key_values=cache, max_new_tokens=3).sequences
        both = torch.cat([F.pad(first_scores, (0, answer.shape[1] - first_scores.shape[1])), second_scores], 1)
        ids = torch.cat([answer, second["input_ids"]], 1)
        turn = {**second, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return generate(turn, both, past_key_values=cache)

    expected = turns(lambda turn, scores, **options: generate_dense(model, turn, scores, **options))
    with va.enable(model, config()):
        out = turns(lambda turn, _scores, **options: model.generate(**turn, **{**GENERATE, **options}))
    assert_same(out, expected)


def test_cropped_cache_forgets_the_scores_of_what_was_cut(backbone: tuple[str, Any]) -> None:
    name, model = backbone
    batch = tiny.inputs(name, [[3, 4, "V", 5, 6]])
    scores = merged_scores(model, batch)
    kept = 8  # inside the video
    text = torch.tensor([[20, 21, 22, 23, 24, 25]])
    n = kept + text.shape[1]
    later = {"position_ids": _positions(name, n)[..., kept:]}
    if not tiny.V5:
        later["cache_position"] = torch.arange(kept, n)
    prompt = {**batch, "position_ids": _positions(name, batch["input_ids"].shape[1])}

    def continue_cropped() -> Tensor:
        cache = DynamicCache()
        model(**prompt, past_key_values=cache, use_cache=True)
        cache.crop(kept - batch["input_ids"].shape[1])
        return model(input_ids=text, past_key_values=cache, use_cache=True, **later).logits

    model.set_attn_implementation("dense_eager")
    dense_eager.state.update(scores=scores, decode="persist")
    with torch.no_grad():
        cache = DynamicCache()
        model(**prompt, past_key_values=cache, use_cache=True)
        cache.crop(kept - batch["input_ids"].shape[1])
        dense_eager.state["scores"] = scores[:, :kept]
        expected = model(input_ids=text, past_key_values=cache, use_cache=True, **later).logits
    dense_eager.state["scores"] = None
    model.set_attn_implementation("sdpa")
    with va.enable(model, config()), torch.no_grad():
        out = continue_cropped()
    torch.testing.assert_close(out, expected, atol=TOLERANCE, rtol=0)


def _positions(name: str, n: int) -> Tensor:
    return torch.arange(n)[None, None].expand(3, 1, n) if name == "qwen2_5_vl" else torch.arange(n)[None]


def test_copied_prefix_continues_twice(backbone: tuple[str, Any]) -> None:
    name, model = backbone
    batch = tiny.inputs(name, [[3, 4, "V", 5, 6]])
    scores = merged_scores(model, batch)
    expected = generate_dense(model, batch, scores)
    n = batch["input_ids"].shape[1]
    by_position = ("input_ids", "attention_mask", "mm_token_type_ids")
    prefix = {key: value[:, : n - 1] if key in by_position else value for key, value in batch.items()}
    rest = {key: value for key, value in batch.items() if not key.startswith("pixel")}
    with va.enable(model, config()), torch.no_grad():
        cache = model(**prefix, past_key_values=DynamicCache(), use_cache=True).past_key_values
        for _ in range(2):
            out = model.generate(**rest, **GENERATE, past_key_values=copy.deepcopy(cache))
            assert_same(out, expected)


def test_sliding_window_layers() -> None:
    model = tiny.build("internvl", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    model.set_attn_implementation("sdpa")
    assert model.config.text_config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    batch = tiny.inputs("internvl", TWO)
    scores = merged_scores(model, batch)
    hook = model.base_model.language_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: dense_eager.state.update(
            n_positions=int(kwargs["past_key_values"].get_seq_length()) + kwargs["inputs_embeds"].shape[1]
        ),
        with_kwargs=True,
    )
    expected = generate_dense(model, batch, scores)
    hook.remove()
    dense_eager.state["n_positions"] = None
    with va.enable(model, config()):
        out = model.generate(**batch, **GENERATE)
    assert_same(out, expected)


@pytest.mark.parametrize("prompts", ["batch-1", "left-padded"])
def test_no_tensor_of_query_by_key_length(backbone: tuple[str, Any], prompts: str) -> None:
    name, model = backbone
    text = [3 + i % 150 for i in range(600)]
    rows = [[*text, "V", 5]] if prompts == "batch-1" else [[*text[:560], "V", 5], [*text, "V", 9, 10]]
    batch = tiny.inputs(name, rows)
    with va.enable(model, config()), torch.no_grad(), LargestSquare(550) as seen:
        model.generate(**batch, **{**GENERATE, "max_new_tokens": 2})
    assert not seen.found
    model.set_attn_implementation("eager")
    with torch.no_grad(), LargestSquare(550) as seen:
        model.generate(**batch, **{**GENERATE, "max_new_tokens": 2})
    assert seen.found, "the eager model makes such tensors, so the check can fail"
