"""Every tiny backbone that the installed transformers has: the gate against an eager model that materialises it; and
what `videoanchor info --backbones` says of them."""

import json
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import dense_eager
import pytest
import tiny_models as tiny
import torch
import transformers
from dense_eager import (
    ALPHA_K,
    ALPHA_Q,
    ALPHA_V,
    GENERATE,
    generate_dense,
    merged_scores,
    plain_attention,
    pseudo_scores,
)
from largest_square import LargestSquare
from transformers import CONFIG_MAPPING

import videoanchor_triton as va
from videoanchor_triton.app import cli
from videoanchor_triton.integrations.transformers.backbones import TESTED, check_chunked_prefill, installed_backbones
from videoanchor_triton.integrations.transformers.visual_tokens import find_multimodal_model

TOLERANCE = 1e-4
CONFIG = va.VideoAnchorConfig(alpha_q=ALPHA_Q, alpha_k=ALPHA_K, alpha_v=ALPHA_V, scorer=pseudo_scores)


def dense(model: Any, batch: dict[str, torch.Tensor], scores: torch.Tensor) -> Any:
    """generate() with the dense gate, sliding-window layers included."""
    language_model = find_multimodal_model(model).get_submodule("language_model")

    def count(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        n_cached = int(kwargs["past_key_values"].get_seq_length())
        dense_eager.state["n_positions"] = n_cached + kwargs["inputs_embeds"].shape[1]

    hook = language_model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        return generate_dense(model, batch, scores)
    finally:
        hook.remove()
        dense_eager.state["n_positions"] = None


@pytest.mark.parametrize("name", tiny.ALL_BACKBONES)
def test_matches_dense_gate(name: str, recwarn: pytest.WarningsRecorder) -> None:
    model = tiny.build(name)
    model.set_attn_implementation(plain_attention(model))
    batch = tiny.inputs(name, [[3, 4, "V", 5], [7, 8, "V", 9, 10, 11, 12]])
    scores = merged_scores(model, batch)
    assert (scores > 0).sum(1).min() > 6
    expected = dense(model, batch, scores)
    ungated = model.generate(**batch, **GENERATE)
    with va.enable(model, CONFIG) as handle:
        out = model.generate(**batch, **GENERATE)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), atol=TOLERANCE, rtol=0)
    assert (out.logits[0] - ungated.logits[0]).abs().amax(1).min() > 1e-2, "the gate must show in every row"
    assert all(result is not None for result in handle.last)
    assert not [one for one in recwarn if "never compared" in str(one.message)]
    handle.last.clear()
    again = model.generate(**batch, **GENERATE)
    assert torch.equal(torch.stack(again.logits), torch.stack(ungated.logits)), "disable() must restore the model"
    assert not handle.last, "nothing is scored after disable()"


@pytest.mark.parametrize("name", tiny.CLASSES)
def test_no_tensor_of_query_by_key_length(name: str) -> None:
    model = tiny.build(name)
    text = [3 + i % 150 for i in range(300)]
    batch = tiny.inputs(name, [[*text[:280], "V", 5], [*text, "V", 9, 10]])
    with va.enable(model, CONFIG), torch.no_grad(), LargestSquare(280) as seen:
        model.generate(**batch, **{**GENERATE, "max_new_tokens": 2})
    assert bool(seen.found) == tiny.TABLE[name].own_mask
    model.set_attn_implementation("eager")
    with torch.no_grad(), LargestSquare(280) as seen:
        model.generate(**batch, **{**GENERATE, "max_new_tokens": 2})
    assert seen.found, "the eager model makes such tensors, so the check can fail"


def test_images_under_another_name_are_scored() -> None:
    """Video-LLaVA's images are `pixel_values_images` in transformers 4.57, and `pixel_values` since."""
    model = tiny.build("video_llava")
    ids = torch.tensor([[3, 4, *[tiny.IMAGE] * 16, 5]])
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with va.enable(model, CONFIG) as handle, torch.no_grad():
        model(input_ids=ids, **{"pixel_values" if tiny.V5 else "pixel_values_images": pixels})
    (result,) = handle.last
    assert result is not None
    assert result.scores.shape == (16,)


def test_what_is_called_tested_is_what_these_tests_run_on() -> None:
    tested = {backbone.model for backbone in installed_backbones() if backbone.tested}
    assert tested == {tiny.TABLE[name].model for name in tiny.ALL_BACKBONES}
    assert set(TESTED) == {row.model for row in tiny.TABLE.values()}


def test_what_decoders_are_called_tested_are_what_these_tests_run_on() -> None:
    run: defaultdict[str, set[str]] = defaultdict(set)
    for name in tiny.ALL_BACKBONES:
        with torch.device("meta"):
            base = find_multimodal_model(tiny.build(name))
        run[tiny.TABLE[name].model].add(base.language_model.config.model_type)  # pyright: ignore
    for model, decoders in run.items():
        listed = {one for one in TESTED[model].decoders if one in CONFIG_MAPPING}
        assert listed == decoders or (not listed and len(decoders) == 1), model


def test_list_leaves_out_what_enable_would_refuse() -> None:
    """SmolVLM's model has no `language_model`, and Florence-2 is an encoder and a decoder."""
    listed = {backbone.model for backbone in installed_backbones()}
    assert not listed & {"SmolVLMForConditionalGeneration", "Florence2ForConditionalGeneration"}


@pytest.mark.skipif(not tiny.V5, reason="transformers 4.57 has no chunked prefill of a video")
@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("name", ["internvl", "glm4v", "glm_ocr", "gemma3", "gemma4", "gemma4_vision", "lfm2_vl"])
def test_chunked_prefill_is_refused_where_transformers_computes_another_thing(name: str, chunk: int) -> None:
    """Without a gate, a padded batch in chunks against the same at once."""
    model = tiny.build(name)
    batch = tiny.inputs(name, [[3, 4, "V", 5], [7, 8, "V", 9, 10, 11, 12]])
    options = {**GENERATE, "max_new_tokens": 1}
    whole, chunked = (
        model.generate(**batch, **options, **more).logits[0] for more in ({}, {"prefill_chunk_size": chunk})
    )
    differs = float((whole - chunked).abs().amax()) > 1e-2
    with pytest.raises(NotImplementedError, match="chunked prefill") if differs else nullcontext():
        check_chunked_prefill(model, find_multimodal_model(model), chunk)


def test_presets_exist() -> None:
    presets = [row.preset for row in TESTED.values() if row.preset is not None]
    assert presets == ["internvl2-8b"]
    for preset in presets:
        va.VideoAnchorConfig.preset(preset)


def test_info_prints_backbones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--backbones"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for backbone in installed_backbones():
        (line,) = [line for line in lines if f" {backbone.model} " in line]
        assert line.startswith(backbone.name)
        assert line.split(backbone.model)[0].split()[-1] == ("yes" if backbone.tested else "no")
        for modality, token in backbone.token_ids.items():
            assert f"{modality} {token}" in line


def test_info_prints_backbones_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--backbones", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["transformers"] == transformers.__version__
    qwen = next(one for one in report["backbones"] if one["model"] == "Qwen2_5_VLForConditionalGeneration")
    assert qwen["tested"] is True
    assert qwen["token_ids"] == {"image": 151655, "video": 151656}
    assert qwen["tested_as"]["checkpoints"] == ["Qwen/Qwen2.5-VL-7B-Instruct"]
    untested = [one for one in report["backbones"] if not one["tested"]]
    assert untested
    assert all(one["tested_as"] is None for one in untested)
