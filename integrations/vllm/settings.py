# pyright: reportMissingImports=false
"""The settings of the gate in vLLM's `additional_config`, and what a server with a gate cannot do."""

import importlib
from typing import Any

from ...anchor.config import VideoAnchorConfig
from .architectures import ARCHITECTURES

KEY = "videoanchor"
CACHE_DTYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3")


def settings_of(additional_config: Any) -> VideoAnchorConfig | None:
    """`additional_config["videoanchor"]`: the fields of `VideoAnchorConfig`, or `"preset"` and fields in place of some
    of the preset's. A scorer of one's own is named as "module:function". None without the key.

    Raises:
        ValueError: a field is unknown, missing or out of its range, or cannot be done in a server.
    """
    if not isinstance(additional_config, dict) or KEY not in additional_config:
        return None
    try:
        fields = dict(additional_config[KEY])
        scorer = fields.get("scorer")
        if isinstance(scorer, str) and ":" in scorer:
            module, _, name = scorer.partition(":")
            fields["scorer"] = getattr(importlib.import_module(module), name)
        preset = fields.pop("preset", None)
        config = VideoAnchorConfig(**fields) if preset is None else VideoAnchorConfig.preset(preset, **fields)
    except (TypeError, ValueError, ImportError, AttributeError) as error:
        raise ValueError(f"videoanchor: additional_config[{KEY!r}]: {error}") from error
    for name, refused, instead in (
        ("decode", config.decode == "prefill", 'leave it out: generated tokens are gated ("persist")'),
        ("arithmetic", config.arithmetic == "authors", "leave it out: use va.enable to compare with the authors' code"),
        ("score", config.looks_at_frames, "leave it out: vLLM does not say to which frame a token belongs"),
    ):
        if refused:
            raise ValueError(f'videoanchor: {name}="{getattr(config, name)}" cannot be served; {instead}')
    if config.merges:
        raise ValueError(
            f"videoanchor: keep={config.keep} cannot be served: vLLM counts a prompt's tokens before it encodes them; "
            "leave it out, or merge within generate() of transformers"
        )
    return config


def check(vllm_config: Any) -> VideoAnchorConfig | None:
    """The settings of a configuration, whose model need not be known yet; None without a gate.

    Raises:
        ValueError: what would run ungated or wrongly, by name, with what to do.
    """
    settings = settings_of(vllm_config.additional_config)
    model = vllm_config.model_config
    if settings is None or model is None:
        return settings
    if model.architecture not in ARCHITECTURES:
        raise ValueError(
            f"videoanchor: {model.architecture} has no gated class; serve one of {', '.join(ARCHITECTURES)}, or remove "
            f"{KEY!r} from --additional-config"
        )
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    chosen = vllm_config.attention_config.backend
    if chosen is not AttentionBackendEnum.CUSTOM and not (current_platform.is_cpu() and chosen is None):
        raise ValueError("videoanchor: the gate needs its own attention: start vLLM with --attention-backend CUSTOM")
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    multimodal = model.multimodal_config
    refused = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        "micro-batches (--enable-dbo)": parallel.use_ubatching,
        "speculative decoding": vllm_config.speculative_config is not None,
        "KV transfer": vllm_config.kv_transfer_config is not None,
        "KV offloading": cache.kv_offloading_size is not None,
        "an encoder in another process (ec_transfer_config)": vllm_config.ec_transfer_config is not None,
        "pruned videos (--video-pruning-rate)": multimodal is not None and multimodal.is_multimodal_pruning_enabled(),
        "CUDA graphs of the encoder (cudagraph_mm_encoder)": vllm_config.compilation_config.cudagraph_mm_encoder,
        "prompts given as embeddings (--enable-prompt-embeds)": model.enable_prompt_embeds,
        "pooling": model.runner_type != "generate",
        "tokens of an image that see each other in both directions": model.is_mm_prefix_lm,
        "state-space and linear-attention layers": model.is_hybrid,
        "latent attention (MLA)": model.use_mla,
        f"--kv-cache-dtype {cache.cache_dtype}": cache.cache_dtype not in CACHE_DTYPES,
    }
    found = [name for name, there in refused.items() if there]
    if found:
        raise ValueError(f"videoanchor: the gate does not work with {', '.join(found)}: start vLLM without")
    return settings
