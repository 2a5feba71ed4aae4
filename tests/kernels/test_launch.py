"""What only the launchers can be asked: any number of programs, addresses beyond 2**31 elements, descriptors."""

import math
from typing import Any

import pytest
import torch
from oracle import Problem, assert_as_exact_as_eager

from videoanchor_triton.kernels.api import anchored_attention
from videoanchor_triton.kernels.api_cache import anchored_attention_decode
from videoanchor_triton.kernels.dispatch import triton_target
from videoanchor_triton.kernels.gates import choose_gate_form
from videoanchor_triton.kernels.operands import Masks, PositionGate
from videoanchor_triton.kernels.ops import varlen_op
from videoanchor_triton.kernels.paged import paged
from videoanchor_triton.kernels.prefill import prefill
from videoanchor_triton.kernels.tiles import PREFILL_SMALLER, Tile, prefill_tile

pytestmark = pytest.mark.usefixtures("poisoned_empty")


PROGRAMS = [
    *((programs, Problem("seven-tiles", queries=3, keys=200)) for programs in (1, 2, 5, 16, 40)),
    (5, Problem("all-keys-padded", queries=3, keys=200, padding="all")),
    (66, Problem("all-but-few-cut", 1, 2, 1, 2, 2100, 32, logits=9.0)),
]


@pytest.mark.parametrize(("programs", "problem"), PROGRAMS, ids=str)
def test_any_number_of_programs_gives_the_same_result(programs: int, problem: Problem, device: torch.device) -> None:
    tensors, options = problem.make(device)
    out = torch.empty_like(tensors[0])
    lse = torch.empty(out.shape[:3], device=device)
    target, _ = triton_target(device)
    assert target is not None
    gate = PositionGate(options["gamma_k"].log(), options["gamma_v"])
    call = {"seqlens_k": None, "max_seqlen_q": problem.queries, "gate": gate, "seen": options.get("key_padding_mask")}
    paged(*tensors, out, lse, Masks(32**-0.5, True, None, None), target, **call, programs=programs)
    del options["gamma_q"]
    assert_as_exact_as_eager((out, lse), tensors, options)


@pytest.mark.parametrize("queries", [2, 33], ids=["decode", "prefill"])
@pytest.mark.parametrize("place", ["row", "head", "batch", "far-rows"])
def test_elements_beyond_31_bits(queries: int, place: str, device: torch.device, far_store: torch.Tensor) -> None:
    head_dim = 16
    stride = {"row": (0, 0, 2**22), "head": (0, 2**30, 16), "batch": (2**30, 0, 16), "far-rows": (0, 0, 2**27)}[place]
    keys = {"row": 2**31 // 2**22 + 8, "far-rows": 20}.get(place, 40)
    shape = (3 if place == "batch" else 1, 3 if place == "head" else 1, keys, head_dim)
    k = far_store.as_strided(shape, (*stride, 1))
    k.copy_(torch.randn(shape))
    v = torch.randn(shape, dtype=torch.float16, device=device)
    q = torch.randn(shape[0], shape[1], queries, head_dim, dtype=torch.float16, device=device)
    gates: dict[str, Any] = {"gamma_v": 1 + torch.rand(keys, device=device)}
    for tensors in ((q, k, v), (q, v, k)):
        found = anchored_attention(*tensors, **gates, backend="triton", return_lse=True)
        assert isinstance(found, tuple)
        assert_as_exact_as_eager(found, (q, tensors[1].contiguous(), tensors[2].contiguous()), gates)


@pytest.mark.parametrize(("queries", "place"), [(2, "head"), (2, "batch"), (33, "head"), (33, "batch"), (520, "row")])
def test_queries_and_outputs_beyond_31_bits(
    queries: int, place: str, device: torch.device, far_store: torch.Tensor
) -> None:
    stride = {"row": (0, 0, 2**22), "head": (0, 2**30, 16), "batch": (2**30, 0, 16)}[place]
    shape = (3 if place == "batch" else 1, 3 if place == "head" else 1, queries, 16)
    near, k = torch.randn(shape).half().to(device), torch.randn((*shape[:2], 20, 16)).half().to(device)
    far, far_out = (far_store.as_strided(shape, (*stride, 1), start) for start in (0, 2**21))
    far.copy_(near)
    target, _ = triton_target(device)
    assert target is not None
    found = []
    for q, out in ((far, far_out), (near, torch.empty_like(near))):
        lse = torch.empty(shape[:3], device=device)
        masks = Masks(0.25, False, None, None)
        if queries == 2:
            paged(q, k, k, out, lse, masks, target, seqlens_k=None, max_seqlen_q=2)
        else:
            prefill(q, k, k, None, None, None, out, lse, masks, False, target)
        found.append((out, lse))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("post_exp", [False, True], ids=["log-bias", "post-exp"])
@pytest.mark.parametrize(
    "problem",
    [
        Problem("descriptors"),
        Problem("descriptors-D80-window", head_dim=80, gate="per-head", window=21, dtype=torch.bfloat16),
        Problem("descriptors-padding-nan", padding="left-nan", queries=50),
        Problem("descriptors-strides-not-aligned", layout="column", keys=61, causal=False),
    ],
    ids=str,
)
def test_descriptors_load_what_pointers_do(problem: Problem, post_exp: bool, device: torch.device) -> None:
    tensors, options = problem.make(device)
    q = tensors[0]
    target, _ = triton_target(device)
    assert target is not None
    found = []
    for tma in (False, True):
        out = torch.empty(q.shape, dtype=q.dtype, device=device)
        lse = torch.empty(q.shape[:3], device=device)
        gates = options["gamma_k"], options["gamma_v"], options.get("key_padding_mask")
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in tensors)
        masks = Masks(problem.head_dim**-0.5, problem.causal, problem.window, None)
        prefill(q, k, v, *gates, out, lse, masks, post_exp, target, tma=tma)
        found.append((out, lse))
    del options["gamma_q"]
    for each in found:
        assert_as_exact_as_eager(each, tensors, options)


@pytest.mark.parametrize(
    ("causal", "window", "head_dim"),
    [(False, None, 16), (True, None, 16), (True, 7, 80)],
    ids=["not-causal", "causal", "window-D80"],
)
def test_descriptors_keep_the_nan_of_a_packed_neighbour_out(
    causal: bool, window: int | None, head_dim: int, device: torch.device
) -> None:
    q, k, v = torch.randn(3, 1, 1, 80, head_dim, device=device)
    offsets = torch.tensor([0, 20, 37, 80], dtype=torch.int32, device=device)
    target, _ = triton_target(device)
    assert target is not None
    found = []
    for tma in (False, True):
        out, lse = torch.empty_like(q), torch.empty(1, 1, 80, device=device)
        packed = {"cu_seqlens": (offsets, offsets, 43), "tma": tma}
        prefill(q, k, v, None, None, None, out, lse, Masks(0.25, causal, window, None), False, target, **packed)
        found.append((out, lse))
        k[:, :, 20:37] = v[:, :, 20:37] = float("nan")
    for clean, poisoned in zip(*found, strict=True):
        for rows in (slice(0, 20), slice(37, 80)):
            assert torch.equal(clean[:, :, rows], poisoned[:, :, rows])


@pytest.mark.parametrize("feature", ["padded", "varlen", "window", "softcap"])
def test_the_tile_is_that_of_the_call(feature: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def recorded(*_: Any, **features: bool) -> Tile:
        asked.append([name for name, used in features.items() if used])
        return Tile(16, 32, 4, 1)

    monkeypatch.setattr("videoanchor_triton.kernels.prefill.prefill_tile", recorded)
    q = torch.randn(1, 1, 33, 16, device=device)
    offsets = torch.tensor([0, 33], dtype=torch.int32, device=device)
    mask = torch.ones(1, 33, dtype=torch.bool, device=device) if feature == "padded" else None
    window, softcap = 9 if feature == "window" else None, 2.0 if feature == "softcap" else None
    packed = (offsets, offsets, 33) if feature == "varlen" else None
    target, _ = triton_target(device)
    assert target is not None
    out, lse = torch.empty_like(q), torch.empty(1, 1, 33, device=device)
    masks = Masks(0.25, True, window, softcap)
    prefill(q, q, q, None, None, mask, out, lse, masks, False, target, cu_seqlens=packed)
    assert asked == [[feature]]


def test_smaller_tiles_are_for_16_bit_elements_and_the_features_named() -> None:
    assert prefill_tile("sm_100", 128, 2, padded=True, window=True).keys == 64
    assert prefill_tile("sm_100", 128, 2, varlen=True, window=True) == prefill_tile("sm_100", 128, 2)
    assert prefill_tile("sm_100", 128, 4, padded=True) == prefill_tile("sm_100", 128, 4)
    for target, features, head_dims, tile in PREFILL_SMALLER:
        for head_dim in head_dims:
            usual = prefill_tile(target, head_dim, 2)
            assert tile.queries * tile.keys < usual.queries * usual.keys
            assert prefill_tile(target, head_dim, 2, **dict.fromkeys(features, True)) == tile


def test_rows_beyond_the_longest_named_length_are_nan(device: torch.device) -> None:
    """Of out, lse and the gradients; rows of no sequence are 0 and -inf and have gradient 0."""
    q, k, v = torch.randn(3, 110, 2, 16, device=device)
    gates = torch.ones(2, 110, device=device)
    offsets = torch.tensor([0, 100], dtype=torch.int32, device=device)
    options = 0.25, True, None, None, False, False
    for longest in (20, 0):
        out, lse = varlen_op(q, k, v, offsets, offsets, longest, 100, *gates, *options)
        computed = int(out.isfinite().all(-1).all(-1)[:100].sum())
        assert longest <= computed < 100
        for x in (out.flatten(1), lse):
            assert x[:computed].isfinite().all()
            assert x[computed:100].isnan().all()
        assert not out[100:].any()
        assert (lse[100:] == -math.inf).all()
    inputs = [x.requires_grad_() for x in (q, k, v, *gates.unbind())]
    for longest in ((20, 100), (100, 20)):
        out, lse = varlen_op(*inputs[:3], offsets, offsets, *longest, *inputs[3:], *options)
        gradients = torch.autograd.grad(out[:100].sum() + lse[:100].sum(), inputs)
        beyond = gradients[:1] if longest[0] == 20 else gradients[1:]
        assert all(x[99].isnan().all() for x in beyond)
        assert not any(x[100:].any() for x in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("post_exp", [False, True], ids=["log-bias", "post-exp"])
def test_gates_beyond_31_bits(
    post_exp: bool, dtype: torch.dtype, device: torch.device, far_store: torch.Tensor
) -> None:
    q, k, v = torch.randn(3, 40, 2, 16, dtype=dtype, device=device)
    offsets = torch.tensor([0, 40], dtype=torch.int32, device=device)
    for shape, strides in (((40,), (2**26,)), ((40, 2), (2**25, 2**30))):
        far = far_store.as_strided(shape, strides)
        far.copy_(1 + torch.rand(shape))
        found, expected = (
            varlen_op(q, k, v, offsets, offsets, 40, 40, gate, gate, 0.25, True, None, None, post_exp, False)
            for gate in (far, far.contiguous())
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_slices_of_gates_masks_and_tables_are_not_copied(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[torch.Size] = []
    contiguous = torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: copied.append(x.shape) or contiguous(x))
    gate, mask = torch.ones(2, 100, device=device)[:, :40], torch.ones(2, 90, device=device).bool()[:, :40]
    q, k = torch.randn(2, 2, 1, 16, device=device), torch.randn(2, 2, 40, 16, device=device)
    anchored_attention(q, k, k, gamma_k=gate, gamma_v=gate, key_padding_mask=mask, backend="triton")
    pages, table = torch.randn(6, 2, 16, 16, device=device), torch.arange(6, device=device).int().view(2, 3)[:, :2]
    lengths = torch.tensor([30, 3], dtype=torch.int32, device=device)
    anchored_attention_decode(q, pages, pages, lengths, table, gamma_k=gate[:, :32], backend="triton")
    assert [shape for shape in copied if len(shape) > 1] == []


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_a_cache_without_contiguous_rows_is_refused(name: str, device: torch.device) -> None:
    q, cache = torch.randn(2, 2, 1, 16, device=device), torch.randn(2, 2, 40, 16, device=device)
    lengths = torch.tensor([40, 3], dtype=torch.int32, device=device)
    caches: dict[str, Any] = {"k_cache": cache, "v_cache": cache} | {name: cache.mT.contiguous().mT}
    with pytest.raises(ValueError, match=rf"{name} must have contiguous rows .* got strides \(1280, 640, 1, 40\)"):
        anchored_attention_decode(q, **caches, cache_seqlens=lengths, backend="triton")
    assert anchored_attention_decode(q, **caches, cache_seqlens=lengths, backend="sdpa").isfinite().all()


def test_choose_gate_form() -> None:
    assert choose_gate_form(torch.tensor([1.0, 2.0**-20, 2.0**20])) == "post-exp"
    assert choose_gate_form(torch.tensor([1.0, 0.0])) == "log-bias"
    assert choose_gate_form(torch.tensor([1.0, 2.0**21])) == "log-bias"
    with pytest.raises(ValueError, match="gamma_k must be finite"):
        choose_gate_form(torch.tensor([1.0, float("nan")]))
