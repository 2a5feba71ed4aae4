"""A question about a video, in one call: on what `make demo` makes, or a checkpoint and a video of yours."""

import sys

import videoanchor_triton as va

model, video = sys.argv[1:] or ("out/demo/checkpoint", "out/demo/clip.mp4")
config = va.VideoAnchorConfig(alpha_k=9.5, alpha_v=2.5)
answer = va.ask(model, video, "Is the lamp to the left or to the right of the sofa?", config, max_new_tokens=16)
print(answer.text)
print(f"{answer.n_visual_tokens} visual tokens, scores up to {answer.anchor.scores.max():.2f}")
print(", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in answer.seconds.items()))
