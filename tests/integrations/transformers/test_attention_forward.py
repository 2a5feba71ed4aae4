"""One attention layer as transformers calls it: sinks, keywords and masks, against fp64."""

import inspect
import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models as tiny
import torch
import transformers as hf
from dense_eager import GENERATE
from tiny_models_table import internvl
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sdpa_mask

import videoanchor_triton as va
from videoanchor_triton.integrations.transformers import attention
from videoanchor_triton.integrations.transformers.backbones import check_decoder
from videoanchor_triton.integrations.transformers.visual_tokens import find_multimodal_model

BATCH, HEADS, KEYS, SCALE = 2, 4, 9, 0.6
UNGATED = va.VideoAnchorConfig(alpha_k=0.0, alpha_v=0.0, scorer="uniform")
NONE = attention.LayerGate()


class Layer(nn.Module):
    """What a decoder's attention layer says of itself."""

    is_causal = True


def problem(queries: int, dtype: torch.dtype = torch.float32, sinks: float = 2.0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(BATCH, heads, n, 16, generator=generator).to(dtype)
        for heads, n in ((HEADS, queries), (2, KEYS), (2, KEYS))
    )
    return {"query": q, "key": k, "value": v, "s_aux": (sinks * torch.randn(HEADS, generator=generator)).to(dtype)}


def gate(rows: int = KEYS - 2) -> attention.LayerGate:
    generator = torch.Generator().manual_seed(1)
    gamma_q, gamma_k, gamma_v = (1 + 3 * torch.rand(BATCH, rows, generator=generator) for _ in range(3))
    return attention.LayerGate(gamma_k.log(), gamma_v, n_positions=KEYS, gamma_q=gamma_q)


def eager(
    given: dict[str, Tensor], visible: Tensor, gate: attention.LayerGate, dtype: torch.dtype = torch.float64
) -> Tensor:
    """softmax over the gated logits and the sink, times the gated values; all in `dtype`. A row without keys is 0."""
    q, k, v, sinks = (x.to(dtype) for x in given.values())
    logits = q @ k.repeat_interleave(2, 1).transpose(2, 3) * SCALE
    v = v.repeat_interleave(2, 1)
    n_queries = q.shape[2]
    if gate.log_gamma_k is not None and gate.gamma_v is not None and gate.gamma_q is not None:
        rows = (0, KEYS - gate.log_gamma_k.shape[1])
        gamma_q, gamma_k, gamma_v = (
            torch.nn.functional.pad(x, rows, value=1.0).to(dtype)
            for x in (gate.gamma_q, gate.log_gamma_k.to(dtype).exp(), gate.gamma_v)
        )
        logits = logits + (gamma_q[:, None, KEYS - n_queries :, None] * gamma_k[:, None, None]).log()
        v = v * gamma_v[:, None, :, None]
    logits = logits.masked_fill(~visible, float("-inf"))
    logits = torch.cat([logits, sinks[None, :, None, None].expand(*logits.shape[:3], 1)], -1)
    return (logits.softmax(-1)[..., :-1].nan_to_num() @ v).transpose(1, 2)


def check(out: Tensor, given: dict[str, Tensor], visible: Tensor, gate: attention.LayerGate) -> None:
    """Within twice the error of the eager form in the same precision, the rounding of the result itself, and that of
    fp32 logits, by which every implementation moves the weights of the values."""
    exact = eager(given, visible, gate)
    allowed = 2 * (eager(given, visible, gate, out.dtype).double() - exact).abs().amax()
    rounding = torch.finfo(out.dtype).eps * exact.abs().amax()
    values = eager({**given, "value": given["value"].abs()}, visible, gate).amax()
    q, k = (given[name].double().abs() for name in ("query", "key"))
    logits = (q @ k.repeat_interleave(2, 1).transpose(2, 3)).amax() * SCALE
    within = 2 * torch.finfo(torch.float32).eps * values * (1 + logits)
    assert (out.double() - exact).abs().amax() <= allowed + rounding + within


def causal(queries: int) -> Tensor:
    return torch.ones(queries, KEYS).tril(KEYS - queries).bool().expand(BATCH, 1, queries, KEYS)


def forward(given: dict[str, Any], mask: Tensor | None, gate: attention.LayerGate, **options: Any) -> Tensor:
    return attention.attention_forward(
        Layer(), attention_mask=mask, scaling=SCALE, videoanchor_gate=gate, **given, **options
    )[0]


def mask_of(form: str, queries: int) -> tuple[Tensor | None, Tensor]:
    """A mask as it comes, and what it lets be seen. The second row has three keys of padding, or sees nothing."""
    visible = causal(queries)
    padded = torch.ones(BATCH, KEYS, dtype=torch.bool)
    padded[1, :3] = False
    if form == "none":
        return None, visible
    if form == "padding":
        return padded.view(torch.uint8)[:, None, None], visible & padded[:, None, None]
    if form == "nothing-visible":
        padded[1] = False
        return padded.view(torch.uint8)[:, None, None], visible & padded[:, None, None]
    visible = visible & padded[:, None, None]
    if form == "bool":
        return visible, visible
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min), visible


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("queries", [5, 1])
@pytest.mark.parametrize("form", ["none", "padding", "nothing-visible", "bool", "float"])
def test_sinks(form: str, queries: int, gated: bool) -> None:
    given, (mask, visible) = problem(queries), mask_of(form, queries)
    layer_gate = gate() if gated else NONE
    out = forward(given, mask, layer_gate)
    check(out, given, visible, layer_gate)
    without = forward({**given, "s_aux": torch.full((HEADS,), -torch.inf)}, mask, layer_gate)
    assert without.isfinite().all()
    assert (without - out).abs().amax() > 0.1


@pytest.mark.parametrize("form", ["padding", "bool"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sinks_in_half_precision(dtype: torch.dtype, form: str) -> None:
    given, (mask, visible) = problem(5, dtype), mask_of(form, 5)
    out = forward(given, mask, gate())
    assert out.dtype == dtype
    check(out, given, visible, gate())


@pytest.mark.parametrize("form", ["padding", "bool"])
def test_gradients_of_sinks(form: str) -> None:
    mask, visible = mask_of(form, 5)
    given = {name: x.requires_grad_() for name, x in problem(5).items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    along = torch.randn(BATCH, 5, HEADS, 16, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad((forward(given, mask, gate()) * along).sum(), list(given.values()))
    expected = torch.autograd.grad((eager(exact, visible, gate()) * along).sum(), list(exact.values()))
    for name, ours, right in zip(given, grads, expected, strict=True):
        torch.testing.assert_close(ours.double(), right, atol=2e-5, rtol=0, msg=lambda text, name=name: name + text)


def test_sinks_that_no_test_knows_are_refused() -> None:
    given = problem(3)
    with pytest.raises(ValueError, match=r"sinks of shape \(4,\), one a head, got \(2, 4, 3, 1\)"):
        forward({**given, "s_aux": torch.zeros(2, HEADS, 3, 1)}, None, NONE)
    layer: Any = Layer()
    layer.config = SimpleNamespace(model_type="deepseek_v4")
    with pytest.raises(ValueError, match=r"never compared with the attention sinks of Layer \(deepseek_v4\)"):
        attention.attention_forward(layer, attention_mask=None, videoanchor_gate=NONE, **given)


@pytest.mark.parametrize("name", ["indices", "block_indices", "position_bias", "something_new"])
def test_keywords_that_may_change_something_are_refused_by_name(name: str) -> None:
    given = problem(3)
    with pytest.raises(ValueError, match=f"has no {name}, which Layer gives to its attention"):
        forward(given, None, NONE, **{name: torch.zeros(1)})
    plain = forward(given, None, NONE)
    harmless = {"use_cache": True, "position_ids": torch.zeros(1), "logits_to_keep": 1}
    assert torch.equal(forward(given, None, NONE, **{name: None}, **harmless), plain)


def test_output_attentions_warns(caplog: pytest.LogCaptureFixture) -> None:
    hf.utils.logging.get_logger(attention.__name__).warning_once.cache_clear()  # pyright: ignore
    hf.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        forward(problem(3), None, NONE, output_attentions=True)
    hf.utils.logging.disable_propagation()
    assert "does not support `output_attentions=True`" in caplog.text


@pytest.mark.parametrize("window", [None, 4], ids=["full", "sliding"])
@pytest.mark.parametrize("queries", [5, 1])
def test_masks_of_a_caller_mean_what_they_mean_to_sdpa(queries: int, window: int | None) -> None:
    """One row for all queries: they see its keys and no others, later ones too."""
    given = problem(queries, torch.float64)
    visible = torch.rand(BATCH, 1, 1, KEYS, generator=torch.Generator().manual_seed(3)) > 0.4
    visible[..., 0] = True
    given.pop("s_aux")
    expected = torch.nn.functional.scaled_dot_product_attention(
        *given.values(), attn_mask=visible, scale=SCALE, enable_gqa=True
    )
    out = forward(given, visible, NONE, sliding_window=window)
    torch.testing.assert_close(out, expected.transpose(1, 2), atol=1e-12, rtol=0)


@pytest.mark.parametrize("mask", [torch.ones(3), torch.ones(2, 3, KEYS).bool(), torch.ones(2, KEYS).int()], ids=str)
def test_masks_of_no_known_form_are_refused(mask: Tensor) -> None:
    with pytest.raises(ValueError, match="attention_mask: expected None"):
        forward(problem(3), mask, NONE)


@pytest.mark.skipif(not tiny.V5, reason="transformers 4.57 does not say so")
def test_a_model_that_builds_on_its_mask_gets_a_whole_one() -> None:
    asked: dict[str, Any] = {"batch_size": 1, "q_length": 4, "kv_length": 6, "q_offset": 2, "kv_offset": 0}
    asked.update(mask_function=causal_mask_function, device=torch.device("cpu"), allow_is_causal_skip=False)
    mask = attention.attention_mask_forward(**asked)
    expected = sdpa_mask(**asked)
    assert mask is not None
    assert expected is not None
    assert torch.equal(mask, expected)


def small_internvl(decoder: str, **options: Any) -> Any:
    row = tiny.TABLE["internvl"]
    tiny.TABLE["here"] = type(row)(row.model, internvl(decoder, **options), row.media)
    try:
        return tiny.build("here")
    finally:
        del tiny.TABLE["here"]


EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
BEYOND = {
    "gpt_oss": {**EXPERTS, **SLIDING, "head_dim": 16},
    "gemma2": {**SLIDING, "head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 3.0},
    "flint": {**SLIDING, "head_dim": 16},
    "granite_swa": SLIDING,
    "granitemoe_swa": {**EXPERTS, **SLIDING},
    "vaultgemma": {**SLIDING, "head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 3.0},
    "doge": {},
}


@pytest.mark.filterwarnings("ignore:VideoAnchor was never compared")
@pytest.mark.parametrize("decoder", [one for one in BEYOND if one in hf.CONFIG_MAPPING])
def test_decoders_beyond_softmax_are_the_plain_model_at_alpha_0(decoder: str) -> None:
    if decoder == "doge" and not tiny.V5:
        pytest.skip("transformers 4.57 does not say that Doge builds on its mask")
    model = small_internvl(decoder, **BEYOND[decoder])
    batch = tiny.inputs("internvl", [[3, 4, "V", 5], [7, 8, "V", 9, 10, 11, 12]])
    model.set_attn_implementation("eager")
    plain = torch.stack(model.generate(**batch, **GENERATE).logits)
    check_decoder(find_multimodal_model(model))
    with va.enable(model, UNGATED):
        ours = torch.stack(model.generate(**batch, **GENERATE).logits)
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=0)


@pytest.mark.skipif("minimax_m3_vl_text" not in hf.CONFIG_MAPPING, reason="needs a newer transformers")
def test_sparse_attention_is_refused() -> None:
    sparse = {"layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"], "head_dim": 16}
    index = {"index_n_heads": 2, "index_head_dim": 16, "index_block_size": 4, "index_topk_blocks": 2}
    model = small_internvl("minimax_m3_vl_text", **sparse, **index, **EXPERTS, dense_intermediate_size=32)
    with pytest.raises(ValueError, match=r"picks: VideoAnchor cannot gate sparse attention"):
        check_decoder(find_multimodal_model(model))
    model.set_attn_implementation({"text_config": attention.IMPLEMENTATION})
    with pytest.raises(ValueError, match="has no block_indices, which MiniMaxM3VLAttention gives"):
        model(**tiny.inputs("internvl", [[3, "V", 4]]))


def test_decoders_that_sdpa_cannot_run_are_refused_and_untested_pairs_named(monkeypatch: pytest.MonkeyPatch) -> None:
    base = find_multimodal_model(tiny.build("internvl"))
    text: Any = base.language_model
    monkeypatch.setattr(text.config, "model_type", "olmo2", raising=False)
    with pytest.warns(UserWarning, match=r"never compared with a dense gate on InternVLModel .* 'olmo2'"):
        check_decoder(base)
    monkeypatch.setattr(type(text), "_supports_sdpa", False)
    with pytest.raises(ValueError, match=r"Qwen2Model \(olmo2\) needs more than softmax"):
        check_decoder(base)


@pytest.mark.skipif(not tiny.V5, reason="needs Gemma 4")
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}], ids=str)
@pytest.mark.parametrize(
    "prompts",
    [[[3, 4, "V", 5], [7, 8, "V", 9, 10, 11, 12]], [[3, 4, 5], [7, 8, 9, 10]], [[*range(3, 43)], [*range(3, 25)]]],
    ids=["video", "text", "past-the-window"],
)
def test_gemma_4_with_shared_keys(prompts: Any, options: dict[str, Any]) -> None:
    model = tiny.build("gemma4_shared")
    batch = tiny.inputs("gemma4_shared", prompts)
    plain = torch.stack(model.generate(**batch, **GENERATE, **options).logits)
    with va.enable(model, UNGATED):
        ours = torch.stack(model.generate(**batch, **GENERATE, **options).logits)
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", tiny.CLASSES)
def test_what_a_tested_forward_takes_may_leak(name: str) -> None:
    """What one forward names reaches the attention layers where the one below has **kwargs."""
    generating: Any = getattr(hf, tiny.TABLE[name].model)
    base = getattr(sys.modules[generating.__module__], generating.__name__.replace("ForConditionalGeneration", "Model"))
    for model in (generating, base):
        parameters = inspect.signature(model.forward).parameters
        named = {name for name, one in parameters.items() if one.kind != one.VAR_KEYWORD}
        assert named - attention.CHANGE_NOTHING <= {"self", "output_attentions"}


@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
def test_a_gated_value_beyond_fp16_under_a_mask_touches_no_row_that_does_not_see_it(additive: bool) -> None:
    query, key = torch.randn(2, 1, 1, 20, 16, generator=torch.Generator().manual_seed(0)).half()
    value, gamma_v = torch.ones_like(key), torch.ones(1, 20)
    value[:, :, -1], gamma_v[:, -1] = 1000, 100
    mask = torch.ones(20, 20, dtype=torch.bool).tril()[None, None]
    if additive:
        mask = torch.zeros(20, 20, dtype=torch.half).masked_fill(~mask, torch.finfo(torch.half).min)
    out = attention._dense_attention(query, key, value, mask, None, None, gamma_v)
    assert out.dtype == torch.half
    assert torch.equal(out[:, :, :-1], torch.ones_like(out[:, :, :-1]))
    assert out.isfinite().all()
