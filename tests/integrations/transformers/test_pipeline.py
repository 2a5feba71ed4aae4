"""transformers' own `pipeline("image-text-to-text")` with the gate, for a video and for an image of a chat message."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

import videoanchor_triton as va
from videoanchor_triton.app import demo

CONFIG = va.VideoAnchorConfig(alpha_k=9.0, alpha_v=2.0, n_clusters=3, scorer="kmeans")
GENERATE = {"max_new_tokens": 6, "do_sample": False}
FRAMES = np.random.default_rng(0).integers(0, 255, (4, 56, 84, 3), dtype=np.uint8)
MEDIA = {"video": FRAMES, "image": Image.fromarray(FRAMES[0])}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    demo.make_checkpoint(folder)
    with pytest.MonkeyPatch.context() as patch:  # attention as it runs for users without a GPU
        patch.setattr("videoanchor_triton.kernels.dispatch._interpreted", lambda: False)
        yield pipeline("image-text-to-text", model=str(folder), device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("kind", MEDIA)
def test_gated_in_three_lines(kind: str, pipe: Any) -> None:
    content = [{"type": kind, kind: MEDIA[kind]}, {"type": "text", "text": "Left or right?"}]
    messages = [{"role": "user", "content": content}]
    ungated = pipe(text=messages, return_tensors=True, generate_kwargs=GENERATE)
    with va.enable(pipe.model, CONFIG) as handle:
        gated = pipe(text=messages, return_tensors=True, generate_kwargs=GENERATE)
        (result,) = handle.last
        inputs = pipe.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        expected = pipe.model.generate(**inputs, **GENERATE)
    assert result is not None
    assert len(result.scores) == (inputs["input_ids"] == getattr(pipe.model.config, f"{kind}_token_id")).sum()
    assert torch.equal(gated[0]["generated_token_ids"], expected[0])
    assert not torch.equal(gated[0]["generated_token_ids"], ungated[0]["generated_token_ids"])
    text = pipe(text=messages, return_full_text=False, generate_kwargs=GENERATE)[0]["generated_text"]
    n_prompt = inputs["input_ids"].shape[1]
    assert text == pipe.tokenizer.decode(ungated[0]["generated_token_ids"][n_prompt:], skip_special_tokens=True)
