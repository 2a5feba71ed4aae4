"""`lmms-eval --model internvl_videoanchor`."""

from typing import Any

from lmms_eval.models.chat.internvl_hf import InternVLHf  # pyright: ignore[reportMissingImports]

from .frames import set_frame_sampling
from .gated_model import GatedModel


class InternVLVideoAnchor(GatedModel, InternVLHf):
    """lmms-eval's `internvl_hf` with the gate, for checkpoints in transformers' own format (-hf, or converted by
    `videoanchor convert`): its arguments, and those of `split_settings`."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        set_frame_sampling(self.processor.video_processor, self.num_frames)
