"""Prefill: gated FlashAttention forward, one program a tile of query rows.

out_i = sum_j p_ij gK_j gV_j v_j / sum_j p_ij gK_j with p_ij = exp(scale q_i.k_j). The value gate (and gK in the
post-exp form) is multiplied into V once, before the launch; gK enters the tile in one of two exact forms.
"""

import math

import torch
import triton
import triton.language as tl

from .gates import expand_gate, pad_gate
from .steps import LN2, finite_max, load_rows, visible_pairs
from .tiles import prefill_tile, split_head_dim

NO_GATE, LOG_BIAS, POST_EXP = 0, 1, 2


@triton.jit
def attend_tiles(
    b_acc0,
    b_acc1,
    b_sum,
    b_max,
    b_q0,
    b_q1,
    p_k,
    p_v,
    p_gate,
    i_start,
    i_end,
    Nk,
    o_position,
    window,
    scale_log2,
    stride_kn,
    stride_vn,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BN: tl.constexpr,
    GATE: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    STAGES: tl.constexpr,
):
    for i_n in tl.range(i_start, i_end, BN, num_stages=STAGES):
        i_n = tl.multiple_of(i_n, BN)
        o_n = i_n + tl.arange(0, BN)
        m_keys = o_n < Nk
        # [BM, BN] = [BM, D0] [D0, BN] + [BM, D1] [D1, BN]
        b_k0 = load_rows(p_k, i_n, stride_kn, m_keys[:, None], BN, D0, MASKED)
        b_s = tl.dot(b_q0, b_k0.T, input_precision="ieee")
        if D1 > 0:
            b_k1 = load_rows(p_k + D0, i_n, stride_kn, m_keys[:, None], BN, D1, MASKED)
            b_s = tl.dot(b_q1, b_k1.T, b_s, input_precision="ieee")
        if GATE != 0:
            # [BN]
            b_gate = tl.load(p_gate + o_n, mask=m_keys, other=0.0) if MASKED else tl.load(p_gate + o_n)
        if GATE == 1:
            b_s = b_s * scale_log2 + b_gate[None, :]
        if MASKED:
            b_s = tl.where(visible_pairs(m_keys, o_n, o_position, window, CAUSAL, WINDOW), b_s, float("-inf"))
        if GATE == 1:
            b_max_new = tl.maximum(b_max, tl.max(b_s, 1))
            b_shift = finite_max(b_max_new)
            b_p = tl.exp2(b_s - b_shift[:, None])
        else:
            b_max_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
            b_shift = finite_max(b_max_new) if MASKED else b_max_new
            b_p = tl.exp2(b_s * scale_log2 - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_p * b_gate[None, :] if GATE == 2 else b_p, 1)
        b_p = b_p.to(p_v.dtype.element_ty)
        # [BM, D0] += [BM, BN] [BN, D0]
        b_v0 = load_rows(p_v, i_n, stride_vn, m_keys[:, None], BN, D0, MASKED)
        b_acc0 = tl.dot(b_p, b_v0, b_acc0 * b_decay[:, None], input_precision="ieee")
        if D1 > 0:
            b_v1 = load_rows(p_v + D0, i_n, stride_vn, m_keys[:, None], BN, D1, MASKED)
            b_acc1 = tl.dot(b_p, b_v1, b_acc1 * b_decay[:, None], input_precision="ieee")
        b_max = b_max_new
    return b_acc0, b_acc1, b_sum, b_max


@triton.jit(do_not_specialize=["Nq", "Nk", "window", "stride_gb", "stride_gh"])
def prefill_kernel(
    q,
    k,
    v,
    gate,
    out,
    lse,
    scale_log2,
    Nq,
    Nk,
    group,
    window,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gb,
    stride_gh,
    stride_ob,
    stride_oh,
    stride_on,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GATE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_m = tl.program_id(0)
    if CAUSAL:
        i_m = tl.num_programs(0) - 1 - i_m  # longest first
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    i_kv = (tl.program_id(1) // group).to(tl.int64)

    p_q = q + i_b * stride_qb + i_h * stride_qh
    p_k = k + i_b * stride_kb + i_kv * stride_kh
    p_v = v + i_b * stride_vb + i_kv * stride_vh
    p_gate = gate + i_b * stride_gb + i_kv * stride_gh if GATE != 0 else None

    i_first = i_m * BM
    o_m = i_first + tl.arange(0, BM)
    m_m = o_m < Nq
    # [BM, D0], [BM, D1]
    b_q0 = load_rows(p_q, i_first, stride_qn, m_m[:, None], BM, D0, True)
    b_q1 = load_rows(p_q + D0, i_first, stride_qn, m_m[:, None], BM, D1, True) if D1 > 0 else 0
    b_acc0 = tl.zeros([BM, D0], tl.float32)
    b_acc1 = tl.zeros([BM, D1], tl.float32) if D1 > 0 else 0
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)

    # keys: [i_start, i_inner) partly visible, [i_inner, i_edge) visible to every row, [i_edge, i_end) partly visible
    position = i_first + Nk - Nq
    i_start = 0
    i_inner = 0
    i_edge = Nk // BN * BN
    i_end = Nk
    if CAUSAL:
        i_edge = tl.minimum(Nk, tl.maximum(position + 1, 0)) // BN * BN
        i_end = tl.minimum(Nk, tl.maximum(position + BM, 0))
    if WINDOW:
        i_start = tl.maximum(position - window + 1, 0) // BN * BN
        i_inner = tl.cdiv(tl.maximum(position + BM - window, 0), BN) * BN
        b_acc0, b_acc1, b_sum, b_max = attend_tiles(
            b_acc0, b_acc1, b_sum, b_max, b_q0, b_q1, p_k, p_v, p_gate, i_start, tl.minimum(i_inner, i_end),
            Nk, o_m + Nk - Nq, window, scale_log2, stride_kn, stride_vn, D0, D1, BN, GATE, True, CAUSAL, WINDOW, STAGES,
        )  # fmt: skip
    b_acc0, b_acc1, b_sum, b_max = attend_tiles(
        b_acc0, b_acc1, b_sum, b_max, b_q0, b_q1, p_k, p_v, p_gate, i_inner, i_edge,
        Nk, o_m + Nk - Nq, window, scale_log2, stride_kn, stride_vn, D0, D1, BN, GATE, False, CAUSAL, WINDOW, STAGES,
    )  # fmt: skip
    b_acc0, b_acc1, b_sum, b_max = attend_tiles(
        b_acc0, b_acc1, b_sum, b_max, b_q0, b_q1, p_k, p_v, p_gate, tl.maximum(i_inner, i_edge), i_end,
        Nk, o_m + Nk - Nq, window, scale_log2, stride_kn, stride_vn, D0, D1, BN, GATE, True, CAUSAL, WINDOW, STAGES,
    )  # fmt: skip

    # a row without a visible key has sum 0 and max -inf: output 0, lse -inf
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    p_rows = out + i_b * stride_ob + i_h * stride_oh + o_m[:, None].to(tl.int64) * stride_on
    tl.store(p_rows + tl.arange(0, D0)[None, :], (b_acc0 / b_sum[:, None]).to(out.dtype.element_ty), mask=m_m[:, None])
    if D1 > 0:
        b_out1 = (b_acc1 / b_sum[:, None]).to(out.dtype.element_ty)
        tl.store(p_rows + D0 + tl.arange(0, D1)[None, :], b_out1, mask=m_m[:, None])
    tl.store(lse + (i_b * tl.num_programs(1) + i_h) * Nq + o_m, (b_max + tl.log2(b_sum)) * LN2, mask=m_m)


def gate_values(v: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """V * weight with weight (B, Hkv, Nk): computed in fp32, stored in V's dtype, one pass."""
    return torch.mul(v, weight[..., None], out=torch.empty_like(v))


def prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gamma_k: torch.Tensor | None,
    gamma_v: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    post_exp: bool,
    target: str,
) -> None:
    """Launch the prefill kernel. Rows of q, k, v and out must be contiguous and less than 2**23 elements apart."""
    batch, query_heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    form, gate, weight = NO_GATE, None, None
    if gamma_v is not None:
        weight = expand_gate(pad_gate(gamma_v.float(), keys), batch, kv_heads)
    if gamma_k is not None:
        # a padded key's gate is 0, and fp16 cannot hold gK*V: both take the form that suits any gate
        form = POST_EXP if post_exp and key_padding_mask is None and v.dtype != torch.float16 else LOG_BIAS
        gate = expand_gate(pad_gate(gamma_k.float(), keys), batch, kv_heads)
        if form == POST_EXP:
            weight = gate if weight is None else gate * weight
        else:
            gate = gate.log2()
    if weight is not None:
        v = gate_values(v, weight)
    if key_padding_mask is not None:
        # the hidden rows of k and v are cleared, since 0 * NaN is NaN
        form = LOG_BIAS
        gate = torch.zeros((batch, 1, keys), device=q.device) if gate is None else gate
        gate = gate.masked_fill(~key_padding_mask[:, None], float("-inf")).expand(batch, kv_heads, keys)
        hidden = ~key_padding_mask[:, None, :, None]
        k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    tile = prefill_tile(target, head_dim, q.element_size())
    d0, d1 = split_head_dim(head_dim)
    prefill_kernel[(triton.cdiv(queries, tile.queries), query_heads, batch)](
        q,
        k,
        v,
        gate,
        out,
        lse,
        scale * math.log2(math.e),
        queries,
        keys,
        query_heads // kv_heads,
        0 if window is None else window,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *(gate.stride()[:2] if gate is not None else (0, 0)),
        *out.stride()[:3],
        D0=d0,
        D1=d1,
        BM=tile.queries,
        BN=tile.keys,
        GATE=form,
        CAUSAL=causal,
        WINDOW=window is not None,
        STAGES=tile.stages,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
