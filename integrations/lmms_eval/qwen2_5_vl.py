"""`lmms-eval --model qwen2_5_vl_videoanchor`."""

from lmms_eval.models.chat.qwen2_5_vl import Qwen2_5_VL  # pyright: ignore[reportMissingImports]

from .gated_model import GatedModel


class Qwen25VLVideoAnchor(GatedModel, Qwen2_5_VL):
    """lmms-eval's `qwen2_5_vl` with the gate: its arguments, and those of `split_settings`."""
