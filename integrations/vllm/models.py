# pyright: reportMissingImports=false
"""vLLM's models with a gate: an item is scored where its embeddings are made, and its scores are taken off them where
they are put among those of the text. `ARCHITECTURE` and `ARCHITECTURE@VERSION` name the gated class of one."""

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.attention import Attention

from .architectures import ARCHITECTURES
from .settings import KEY, check
from .step_gates import StepGates, attach, detach


class Gated:
    """Before a multimodal model of vLLM in the order of bases. Inert without settings."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # pyright: ignore[reportCallIssue]
        self.step_gates: StepGates | None = None
        settings = check(vllm_config)
        if settings is None:
            return
        decoder: Any = self.get_language_model()  # pyright: ignore[reportAttributeAccessIssue]
        self._layers = [module for module in decoder.modules() if isinstance(module, Attention)]
        n_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        device = vllm_config.device_config.device
        assert device is not None
        self.step_gates = StepGates(settings, n_tokens, torch.device(device))
        self._width = vllm_config.model_config.get_inputs_embeds_size()
        for layer in self._layers:
            if not hasattr(layer.impl, "gates"):
                raise ValueError(
                    f"videoanchor: the decoder's attention is {type(layer.impl).__name__}, which takes no gate: start "
                    "vLLM with --attention-backend CUSTOM"
                )
            if layer.has_sink or getattr(layer.impl, "alibi_slopes", None) is not None or layer.attn_type != "decoder":
                raise ValueError(
                    f"videoanchor: {layer.layer_name} has sinks, ALiBi, or attention that is not a decoder's: serve "
                    f"another model, or remove {KEY!r} from --additional-config"
                )
            layer.impl.gates = self.step_gates  # pyright: ignore[reportAttributeAccessIssue]

    def embed_multimodal(self, **kwargs: object) -> Any:
        """The embeddings of each item, each with its scores in further columns."""
        items = super().embed_multimodal(**kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if self.step_gates is None or items is None:
            return items
        # LLaVA-OneVision's have a leading axis of one where videos of several lengths are encoded together
        items = [item.flatten(0, -2) for item in items]
        if self._layers[0].kv_cache.numel() == 0:  # vLLM measures memory with items of nothing, before there is a cache
            return tuple(attach(item, item.new_zeros(len(item))) for item in items)
        return tuple(attach(item, self._score(item)) for item in items)

    def _score(self, item: Tensor) -> Tensor:
        assert self.step_gates is not None
        tokens = item[:, : self._width]  # Qwen3-VL has further levels beside them
        group = get_tp_group()
        if group.world_size == 1:
            return self.step_gates.score(tokens)
        scores = tokens.new_empty(len(tokens), dtype=torch.float32)
        if group.rank_in_group == 0:  # two processes could round to other clusters
            scores = self.step_gates.score(tokens)
        return group.broadcast(scores, src=0)

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """As vLLM's, which calls it in every step, outside of CUDA graphs; the scores become those of the step."""
        if self.step_gates is not None:
            parts = [detach(item) for item in multimodal_embeddings or ()]
            self.step_gates.set_step(len(input_ids), is_multimodal if parts else None, [scores for _, scores in parts])
            multimodal_embeddings = [item for item, _ in parts] if parts else multimodal_embeddings
        return super().embed_input_ids(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def videoanchor_summary(self) -> dict[str, Any]:
        """Settings and counts of this model, for `LLM.apply_model`; empty without a gate."""
        return {} if self.step_gates is None else self.step_gates.summary()


@cache
def gated_class(architecture: str) -> type[Any]:
    """The gated class of an architecture."""
    module, _, name = ARCHITECTURES[architecture].partition(".")
    base = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)
    return type(f"Gated{name}", (Gated, base), {"__module__": __name__, "__doc__": f"vLLM's {name} with a gate."})


def __getattr__(name: str) -> Any:
    architecture = name.partition("@")[0]
    if architecture not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return gated_class(architecture)
