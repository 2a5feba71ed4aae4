"""Two videos and an image in one conversation, in transformers' chat format, and the scores of each of them."""

import sys

import videoanchor_triton as va

model, video = sys.argv[1:] or ("out/demo/checkpoint", "out/demo/clip.mp4")
frame = va.read_video(video, max_frames=1).frames[0]  # (height, width, 3) uint8, as any image
messages = [
    {"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": "What is in this room?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A lamp and a sofa."}]},
    {
        "role": "user",
        "content": [
            {"type": "image", "image": frame},
            {"type": "video", "video": video},
            {"type": "text", "text": "Which of these two shows the same place?"},
        ],
    },
]
config = va.VideoAnchorConfig(alpha_k=9.5, alpha_v=2.5, scorer="kmeans")
answer = va.ask(model, None, messages, config, max_frames=6, max_new_tokens=16)
print(answer.text)
scores = answer.anchor.scores.split([grid.n_tokens for grid in answer.grids])
for grid, part in zip(answer.grids, scores, strict=True):
    print(f"{grid.t} x {grid.h} x {grid.w} tokens, mean score {part.mean():.3f}")
