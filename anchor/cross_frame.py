"""An opt-in score that looks across frames: how much of a token is explained by what other frames show."""

import torch
from torch import Tensor

from .solver import SelfExpression


def check_frames(frames: Tensor, n_tokens: int) -> Tensor:
    """`frames` as int64, each frame numbered 0, 1, ... in the order of its id.

    Raises:
        TypeError: frames is not a tensor of integers.
        ValueError: its shape is not (n_tokens,).
    """
    if (
        not isinstance(frames, Tensor)
        or frames.is_floating_point()
        or frames.is_complex()
        or frames.dtype == torch.bool
    ):
        found = frames.dtype if isinstance(frames, Tensor) else type(frames).__name__
        raise TypeError(f"frames must be a tensor of integers, the frame of each token, got {found}")
    if frames.shape != (n_tokens,):
        raise ValueError(
            f"frames must have shape ({n_tokens},), the frame of each token in the order of X, got "
            f"{tuple(frames.shape)}"
        )
    return frames.long().unique(return_inverse=True)[1]


def cross_frame_score(solution: SelfExpression, labels: Tensor, frames: Tensor) -> Tensor:
    """The cross-frame score (this package's own, not VideoAnchor's).

    s_j = x_j * m_c with c the cluster of token j:

    - x_j = sum_{i: f_i != f_j} |W_ij| / sum_i |W_ij|, the share of token j's self-expression that comes from other
      frames than its own, f_j. A token that nothing expresses has x_j = 0.
    - m_c = (exp(H_c) - 1) / (F - 1), how many of the F frames cluster c spans: exp(H_c) is the effective number of
      frames (Hill number of order 1), H_c = -sum_f q_cf log q_cf, where q_cf is proportional to n_cf / n_f, the part
      of frame f's tokens that is in cluster c, and sums to 1 over f. A cluster that fills the same part of every frame
      has m_c = 1, one of a single frame 0.

    With a single frame all scores are 0. The score is absolute: unlike the published one it is not stretched to reach 0
    and 1. Neither the size of a cluster nor the numbering of frames and clusters matters.

    In benchmarks/results/cross-frame it finds what all frames share better than the published score in all clips of
    made-up subspaces and where photographs share half a frame; under a moving camera in 14 of 15 clips over one
    photograph, by little, and in 3 of 15 over the other. What a trained model gains from it was not measured.

    Time and memory grow with the coefficients kept, N * k. On one device the result is the same to the bit run to run.

    Args:
        solution: self-expression of N tokens.
        labels: (N,) integers >= 0, the cluster of each token; some clusters may be empty.
        frames: (N,) integers, the frame of each token; any ids, in any order, on any device.

    Returns:
        (N,) float32 scores in [0, 1], on the device of the solution.

    Raises:
        TypeError: frames is not a tensor of integers.
        ValueError: the shape of labels or frames is not (N,).
    """
    n_tokens = len(solution.values)
    if labels.shape != (n_tokens,):
        raise ValueError(f"labels must have shape ({n_tokens},), one per token, got {tuple(labels.shape)}")
    device = solution.values.device
    frame = check_frames(frames, n_tokens).to(device)
    if n_tokens == 0 or not frame.any():
        return torch.zeros(n_tokens, device=device)
    weight = solution.values.abs().double()
    elsewhere = frame[solution.indices] != frame[:, None]
    total = weight.sum(1)
    share = torch.where(total > 0, (weight * elsewhere).sum(1) / total, 0.0)
    spanned = _spanned_frames(labels.cpu(), frame.cpu()).to(device)
    return (share * spanned).clamp(0, 1).float()


def _spanned_frames(labels: Tensor, frame: Tensor) -> Tensor:
    """(N,) m_c of each token's cluster; float64, on the CPU: atomic additions on a GPU come in any order."""
    n_frames = int(frame.amax()) + 1
    pairs, n_tokens = (labels.long() * n_frames + frame).unique(return_counts=True)
    cluster = pairs // n_frames
    part = n_tokens.double() / torch.bincount(frame)[pairs % n_frames]
    part /= torch.bincount(cluster, weights=part)[cluster]
    entropy = torch.bincount(cluster, weights=-torch.xlogy(part, part))
    return ((entropy.exp() - 1) / (n_frames - 1))[labels.long()]
