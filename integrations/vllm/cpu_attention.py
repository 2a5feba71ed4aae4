# pyright: reportMissingImports=false
"""Attention of a gated model on vLLM's CPU build: this package's two calls over pages, in torch."""

from typing import Any

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from .gated_attention import GatedAttention


class GatedCPUImpl(GatedAttention, CPUAttentionBackendImpl):
    """vLLM's own where the layer has no gate."""

    backend = "sdpa"

    @property
    def window(self) -> int | None:
        return self.sliding_window if self.sliding_window > 0 else None


class GatedCPUBackend(CPUAttentionBackend):
    """In the place of vLLM's `CPU_ATTN`."""

    @staticmethod
    def get_impl_cls() -> type[Any]:
        return GatedCPUImpl
