"""The gate around a `generate()` of your own, and the scores as (time, row, column)."""

import sys

from transformers import AutoModelForImageTextToText, AutoProcessor

import videoanchor_triton as va

name, video = sys.argv[1:] or ("out/demo/checkpoint", "out/demo/clip.mp4")
model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained(name)
clip = va.read_video(video, max_frames=8)
inputs, (grid,) = va.prepare(model, processor, clip, "Is the lamp to the left or to the right of the sofa?")

with va.enable(model, va.VideoAnchorConfig(alpha_k=9.5, alpha_v=2.5)) as handle:
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
print(processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
print(grid.arrange(handle.last[0].scores.cpu().numpy()).mean((1, 2)))  # by time
