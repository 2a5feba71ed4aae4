# pyright: reportMissingImports=false
"""Attention of a gated model in vLLM on CUDA: vLLM's Triton backend, its metadata and its cache, with this package's
two calls over pages. In Triton's interpreter it runs on a CPU as well."""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from vllm.config.cache import CacheDType
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from .gated_attention import GatedAttention

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.utils.quant_utils import QuantKey


class GatedTritonBuilder(TritonAttentionMetadataBuilder):
    """The grid of our launch depends on the longest query, so that graphs hold batches of equally long ones."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH


class GatedTritonImpl(GatedAttention, TritonAttentionImpl):
    """vLLM's own where the layer has no gate."""

    backend = "triton"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.supports_quant_query_input = False  # our kernel takes queries as the model makes them

    def fused_output_quant_supported(self, quant_key: "QuantKey") -> bool:  # noqa: ARG002
        return False

    @property
    def window(self) -> int | None:
        before, _ = self.sliding_window
        return before + 1 if before >= 0 else None


class GatedTritonBackend(TritonAttentionBackend):
    """`--attention-backend CUSTOM`."""

    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = ["auto", "float16", "bfloat16", "fp8", "fp8_e4m3"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[GatedTritonImpl]:
        return GatedTritonImpl

    @staticmethod
    def get_builder_cls() -> type[GatedTritonBuilder]:
        return GatedTritonBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return 32 <= head_size <= 256

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return False

    @classmethod
    def supports_sink(cls) -> bool:
        return False

    @classmethod
    def supports_alibi_sqrt(cls) -> bool:
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        return False

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == "decoder"


class InterpretedTritonImpl(GatedTritonImpl):
    """Where no layer has a gate, too: vLLM's writer asks CUDA for its capability."""

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        self.write(layer, key, value, kv_cache, slot_mapping)


class GatedTritonBackendOnCPU(GatedTritonBackend):
    """The same under the only name that vLLM's CPU platform asks for."""

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"

    @staticmethod
    def get_impl_cls() -> type[InterpretedTritonImpl]:
        return InterpretedTritonImpl
