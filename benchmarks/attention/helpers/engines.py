"""Other people's attention over pages, in the form in which an engine calls it, on the cache of `MixedInputs`.

None of them takes a gate by key but FlexAttention; the SDPA form gathers each sequence's pages first, in the clock.
"""

import importlib
import inspect
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.attention.helpers.contenders import Run
from benchmarks.attention.helpers.mixed import MixedInputs

VLLM = "vllm.v1.attention.ops.triton_unified_attention"
VLLM_PAGE = 16
VLLM_SEGMENTS, VLLM_GRID = 16, 128  # of vllm/v1/attention/backends/triton_attn.py
PAGED_FLEX = "torch.nn.attention.experimental._paged_attention"


def absence(module: str) -> str:
    """Why a module cannot be used here, or nothing."""
    try:
        importlib.import_module(module)
    except Exception as failure:  # an installed one may fail in any way on its way in
        said = (str(failure).splitlines() or [""])[0]
        return f"{module} cannot be imported: {type(failure).__name__}: {said}"
    return ""


def flash_attn_varlen(inputs: MixedInputs) -> Run:
    """flash-attn's call of packed queries over pages."""
    attend: Any = importlib.import_module("flash_attn").flash_attn_varlen_func
    k, v = (x.transpose(1, 2) for x in inputs.pages(inputs.batch.page))
    cu_k = F.pad(inputs.seqlens_k.cumsum(0), (1, 0)).int()
    longest = max(inputs.batch.queries), max(inputs.batch.keys)
    table = inputs.table(inputs.batch.page)
    return lambda: attend(inputs.q, k, v, inputs.cu_seqlens_q, cu_k, *longest, causal=True, block_table=table)


def flash_attn_cache(inputs: MixedInputs) -> Run:
    """flash-attn's call that splits the keys, for equal numbers of queries."""
    attend: Any = importlib.import_module("flash_attn").flash_attn_with_kvcache
    k, v = (x.transpose(1, 2) for x in inputs.pages(inputs.batch.page))
    q = inputs.q.view(-1, inputs.batch.equal, *inputs.q.shape[1:])
    table = inputs.table(inputs.batch.page)
    return lambda: attend(q, k, v, cache_seqlens=inputs.seqlens_k, block_table=table, causal=True).flatten(0, 1)


def vllm_unified(inputs: MixedInputs) -> Run:
    """vLLM's Triton kernel as its backend calls it: split into segments where it does so."""
    attend: Any = importlib.import_module(VLLM).unified_attention
    k, v = (x.transpose(1, 2) for x in inputs.pages(VLLM_PAGE))
    (tokens, heads, head_dim), device = inputs.q.shape, inputs.q.device
    out, width = torch.empty_like(inputs.q), 1 << (head_dim - 1).bit_length()
    split: dict[str, Any] = {
        "seq_threshold_3D": VLLM_GRID // inputs.kv_heads,
        "num_par_softmax_segments": VLLM_SEGMENTS,
        "softmax_segm_output": torch.empty(tokens, heads, VLLM_SEGMENTS, width, device=device),
        "softmax_segm_max": torch.empty(tokens, heads, VLLM_SEGMENTS, device=device),
        "softmax_segm_expsum": torch.empty(tokens, heads, VLLM_SEGMENTS, device=device),
    }
    # older ones make these themselves
    split = {name: x for name, x in split.items() if name in inspect.signature(attend).parameters}
    given: dict[str, Any] = {
        "q": inputs.q, "k": k, "v": v, "out": out, "cu_seqlens_q": inputs.cu_seqlens_q,
        "max_seqlen_q": max(inputs.batch.queries), "seqused_k": inputs.seqlens_k,
        "max_seqlen_k": max(inputs.batch.keys), "softmax_scale": head_dim**-0.5, "causal": True,
        "window_size": (-1, -1), "block_table": inputs.table(VLLM_PAGE), "softcap": 0.0, "q_descale": None,
        "k_descale": None, "v_descale": None,
    }  # fmt: skip

    def run() -> torch.Tensor:
        attend(**given, **split)
        return out

    return run


def sdpa_by_sequence(gated: bool) -> Any:
    """SDPA, a sequence at a time. Gated: K and V are repeated for a mask that holds log gK, which is built once."""

    def make(inputs: MixedInputs) -> Run:
        sizes = list(zip(inputs.batch.queries, inputs.batch.keys, strict=True))
        group = inputs.batch.group
        masks = [
            _gate_mask(inputs, b, *size) if gated else _causal_mask(*size, inputs.device)
            for b, size in enumerate(sizes)
        ]

        def run() -> torch.Tensor:
            outs = []
            for b, q in enumerate(inputs.q.split(inputs.batch.queries)):
                k, v = inputs.keys_and_values(b, inputs.batch.page)
                q = q.transpose(0, 1)[None]
                if gated:
                    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=masks[b], enable_gqa=not gated)
                outs.append(out[0].transpose(0, 1))
            return torch.cat(outs)

        return run

    return make


def _causal_mask(queries: int, keys: int, device: torch.device) -> Any:
    """None for one query, else torch's bottom-right causal bias, for which it has fused kernels."""
    from torch.nn.attention.bias import causal_lower_right

    return (
        None
        if queries == 1
        else causal_lower_right(queries, keys)
        if device.type == "cuda"
        else _hidden(queries, keys, device)
    )


def _hidden(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _gate_mask(inputs: MixedInputs, sequence: int, queries: int, keys: int) -> torch.Tensor:
    bias = (
        inputs.gamma_k[inputs.slots_of(sequence, inputs.batch.page, keys)].log().to(inputs.q.dtype).expand(queries, -1)
    )
    return bias.masked_fill(~_hidden(queries, keys, inputs.device), float("-inf"))[None, None]


def paged_flex(gated: bool) -> Any:
    """FlexAttention over pages by torch's experimental PagedAttention, compiled; the score takes log gK by slot."""

    def make(inputs: MixedInputs) -> Run:
        paged: Any = importlib.import_module(PAGED_FLEX).PagedAttention
        queries, lengths = inputs.batch.equal, inputs.seqlens_k
        count, table = len(inputs.batch.keys), inputs.table(inputs.batch.page).long()
        held = paged(inputs.slots // inputs.batch.page, inputs.batch.page, count, device=str(inputs.device))
        for b, n in enumerate(inputs.batch.keys):
            used = -(-n // inputs.batch.page)
            held.page_table[b, :used] = table[b, :used]
            held.physical_to_logical[b, table[b, :used]] = torch.arange(used, device=inputs.device)

        def visible(b: Any, _h: Any, i: Any, j: Any) -> Any:
            return j <= lengths[b] - queries + i

        longest = table.shape[1] * inputs.batch.page
        logical: BlockMask = create_block_mask(
            visible, count, None, queries, longest, device=str(inputs.device), BLOCK_SIZE=(128, inputs.batch.page)
        )
        blocks = held.convert_logical_block_mask(logical, kv_len=lengths)
        bias = inputs.gamma_k.log()
        score_mod = (lambda s, _b, _h, _i, slot: s + bias[slot]) if gated else None
        k, v = (x.transpose(0, 1)[None] for x in inputs.cache.chunk(2, -1))
        q = inputs.q.view(count, queries, *inputs.q.shape[1:]).transpose(1, 2)
        torch._dynamo.reset()
        attend: Any = torch.compile(flex_attention, dynamic=False) if inputs.q.is_cuda else flex_attention

        def run() -> torch.Tensor:
            out = attend(q, k, v, score_mod, block_mask=blocks, enable_gqa=True)
            return out.transpose(1, 2).flatten(0, 1)

        return run

    return make
