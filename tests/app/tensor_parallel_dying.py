"""What the processes of a split model hold in a test, in place of a `VideoModel`."""

import os
import signal
from pathlib import Path
from typing import Any

from videoanchor_triton.app.prompt import Messages
from videoanchor_triton.app.video_model import Answered, VideoModel

DEADLY = "word9 word9"


class DyingModel(VideoModel):
    """The second process dies at the question `DEADLY`. Every process leaves a file of its id in the folder that
    VIDEOANCHOR_TEST_PIDS names, with the rows of the query projection that it holds."""

    def answer(self, question: Messages) -> Answered:
        model: Any = self._model.base_model
        query = model.language_model.layers[0].self_attn.q_proj.weight
        query = query.to_local() if hasattr(query, "to_local") else query  # transformers 4.57: a plain tensor
        Path(os.environ["VIDEOANCHOR_TEST_PIDS"], str(os.getpid())).write_text(str(query.shape[0]))
        if question == DEADLY and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().answer(question)
