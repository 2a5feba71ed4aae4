# pyright: reportMissingImports=false
"""The two calls of an attention layer of vLLM: write the step's keys, values and gates, then attend over pages."""

from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from ...kernels.api_paged import anchored_attention_paged, write_pages
from ...kernels.gate_pages import GatePages
from .step_gates import StepGates

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionImpl as _Base
else:
    _Base = object


class _Cache(TypedDict):
    k_pages: Tensor
    v_pages: Tensor
    gate_pages: GatePages | None
    k_scale: Tensor | None
    v_scale: Tensor | None


class GatedAttention(_Base):
    """Before an attention of vLLM in the order of bases, which does what it does where the layer has no gate.

    Attributes:
        gates: set by the model that owns the layer.
        backend: of this package, see `anchored_attention_paged`.
        window: keys that a query sees, its own among them; None: all.
    """

    gates: StepGates | None = None
    backend: str
    head_size: int
    scale: float
    logits_soft_cap: float
    alibi_slopes: Tensor | None
    sinks: Tensor | None

    @property
    def window(self) -> int | None:
        raise NotImplementedError

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Keys and values (n, Hkv, D) of the step into the slots (n,) of a cache (P, Hkv, page, 2 D)."""
        if self.gates is None:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        else:
            self.write(layer, key, value, kv_cache, slot_mapping)

    def write(self, layer: torch.nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        n = slot_mapping.shape[0]
        gates = self.gates
        gammas = {} if gates is None else {"gamma_k": gates.gamma_k[:n], "gamma_v": gates.gamma_v[:n]}
        cache = self._cache(layer, kv_cache, key.dtype)
        write_pages(key[:n], value[:n], slot_mapping=slot_mapping, **cache, **gammas, backend=self.backend)

    def _cache(self, layer: Any, kv_cache: Tensor, dtype: torch.dtype) -> _Cache:
        quantised = kv_cache.itemsize == 1
        if quantised and kv_cache.dtype != torch.float8_e4m3fn:
            kv_cache = kv_cache.view(torch.float8_e4m3fn)
        k_pages, v_pages = kv_cache.split(self.head_size, dim=-1)
        pages = None
        if self.gates is not None:
            # where the numbers of the cache are coarse or bounded, its values stay the model's own
            form = "apart" if quantised or dtype == torch.float16 else "written"
            pages = self.gates.pages(kv_cache.shape[0], kv_cache.shape[2], form)
        k_scale, v_scale = (layer._k_scale, layer._v_scale) if quantised else (None, None)
        return _Cache(k_pages=k_pages, v_pages=v_pages, gate_pages=pages, k_scale=k_scale, v_scale=v_scale)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Queries (n, Hq, D) of the step, packed, to `output` (n, Hq, D)."""
        if self.gates is None:
            scales = output_scale, output_block_scale
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
        return self.attend(layer, query, kv_cache, attn_metadata, output, (output_scale, output_block_scale))

    def attend(
        self, layer: Any, query: Tensor, kv_cache: Tensor, attn_metadata: Any, output: Tensor, scales: tuple[Any, Any]
    ) -> Tensor:
        if attn_metadata is None:  # vLLM measures memory
            return output.fill_(0)
        if attn_metadata.causal is not True or scales != (None, None):
            raise ValueError("videoanchor: the gate is for causal attention with outputs of full precision")
        n = attn_metadata.num_actual_tokens
        anchored_attention_paged(
            query[:n],
            cu_seqlens_q=attn_metadata.query_start_loc,
            seqlens_k=attn_metadata.seq_lens,
            block_table=attn_metadata.block_table,
            max_seqlen_q=attn_metadata.max_query_len,
            scale=self.scale,
            window=self.window,
            softcap=self.logits_soft_cap or None,
            out=output[:n],
            backend=self.backend,
            **self._cache(layer, kv_cache, query.dtype),
        )
        return output
