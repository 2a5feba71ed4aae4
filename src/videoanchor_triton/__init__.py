"""VideoAnchor for video language models: subspace scores of visual tokens, and attention gated by them.

Importing this package makes `attn_implementation="videoanchor_triton"` known to transformers, as soon as transformers
is imported. Nothing heavy is imported before a name is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .integrations.transformers import registration

if TYPE_CHECKING:
    from .anchor.compress import Compressed, compress
    from .anchor.config import VideoAnchorConfig
    from .anchor.estimator import SparseSubspaceClustering
    from .anchor.options import SolverOptions
    from .anchor.scores import AnchorResult, anchor_scores
    from .anchor.solver import SelfExpression, self_expression
    from .anchor.streaming import AnchorStream
    from .app.answer import Answer
    from .app.pipeline import ask, prepare
    from .app.video.reader import VideoClip, read_video
    from .integrations.transformers.enable import disable, enable
    from .integrations.transformers.handle import Handle
    from .kernels.api import anchored_attention, anchored_attention_varlen
    from .kernels.api_cache import anchored_attention_decode
    from .kernels.api_paged import anchored_attention_paged, write_pages
    from .kernels.dispatch import available_backends
    from .kernels.gate_pages import GatePages, gate_pages
    from .kernels.gates import choose_gate_form
    from .kernels.merge import merge_attention

__version__ = "0.2.0"
__all__ = [
    "AnchorResult",
    "AnchorStream",
    "Answer",
    "Compressed",
    "GatePages",
    "Handle",
    "SelfExpression",
    "SolverOptions",
    "SparseSubspaceClustering",
    "VideoAnchorConfig",
    "VideoClip",
    "anchor_scores",
    "anchored_attention",
    "anchored_attention_decode",
    "anchored_attention_paged",
    "anchored_attention_varlen",
    "ask",
    "available_backends",
    "choose_gate_form",
    "compress",
    "disable",
    "enable",
    "gate_pages",
    "merge_attention",
    "prepare",
    "read_video",
    "self_expression",
    "write_pages",
]

_HOME = {
    "AnchorResult": ".anchor.scores",
    "AnchorStream": ".anchor.streaming",
    "Answer": ".app.answer",
    "Compressed": ".anchor.compress",
    "GatePages": ".kernels.gate_pages",
    "Handle": ".integrations.transformers.handle",
    "SelfExpression": ".anchor.solver",
    "SolverOptions": ".anchor.options",
    "SparseSubspaceClustering": ".anchor.estimator",
    "VideoAnchorConfig": ".anchor.config",
    "VideoClip": ".app.video.reader",
    "anchor_scores": ".anchor.scores",
    "anchored_attention": ".kernels.api",
    "anchored_attention_decode": ".kernels.api_cache",
    "anchored_attention_paged": ".kernels.api_paged",
    "anchored_attention_varlen": ".kernels.api",
    "available_backends": ".kernels.dispatch",
    "ask": ".app.pipeline",
    "choose_gate_form": ".kernels.gates",
    "compress": ".anchor.compress",
    "disable": ".integrations.transformers.enable",
    "enable": ".integrations.transformers.enable",
    "gate_pages": ".kernels.gate_pages",
    "merge_attention": ".kernels.merge",
    "prepare": ".app.pipeline",
    "read_video": ".app.video.reader",
    "self_expression": ".anchor.solver",
    "write_pages": ".kernels.api_paged",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


registration.register_with_transformers()
