"""The gate in transformers' own pipeline."""

import sys

from transformers import pipeline

import videoanchor_triton as va

name, video = sys.argv[1:] or ("out/demo/checkpoint", "out/demo/clip.mp4")
pipe = pipeline("image-text-to-text", model=name)
frames = va.read_video(video, max_frames=8).frames  # a path works too, where torchcodec is installed
content = [{"type": "video", "video": frames}, {"type": "text", "text": "What is on the left?"}]
messages = [{"role": "user", "content": content}]

with va.enable(pipe.model, va.VideoAnchorConfig(alpha_k=9.5, alpha_v=2.5)) as handle:
    answer = pipe(text=messages, return_full_text=False, generate_kwargs={"max_new_tokens": 16, "do_sample": False})
    print(handle.last[0].scores.shape)
print(answer[0]["generated_text"])
