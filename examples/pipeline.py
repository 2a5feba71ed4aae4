"""The gate in transformers' own pipeline: three lines more than without."""

import sys

from transformers import pipeline

import videoanchor_triton as va

name, video = sys.argv[1:] or ("out/demo/checkpoint", "out/demo/clip.mp4")
pipe = pipeline("image-text-to-text", model=name)
content = [{"type": "video", "video": video}, {"type": "text", "text": "What is on the left?"}]
with va.enable(pipe.model, va.VideoAnchorConfig(alpha_k=9.5, alpha_v=2.5)) as handle:
    answer = pipe(text=[{"role": "user", "content": content}], max_new_tokens=16, return_full_text=False)
    print(handle.last[0].scores.shape)
print(answer[0]["generated_text"])
