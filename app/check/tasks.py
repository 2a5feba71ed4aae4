"""What `videoanchor check` finds out, a task at a time, in a process of its own."""

import time
from typing import Any

import torch

from ...anchor.config import VideoAnchorConfig
from ...anchor.scores import anchor_scores
from ...integrations.errors import InputError
from ...kernels.dispatch import triton_target
from ...kernels.hopper import hopper_enabled
from ...kernels.sanity import forms
from ...kernels.tiles import INTERPRETER
from ..machine import machine, one_device
from .times import beside_sdpa

TOKENS, SUBSPACES = 648, 6


def answer(task: str, device: str) -> dict[str, Any]:
    """What a task found: "machine", "form: NAME", "time: prefill", "time: decode" or "scores"."""
    kind, _, name = task.partition(": ")
    try:
        there = one_device(device)
    except InputError as error:
        return {"refused": str(error)}
    if kind == "machine":
        target = triton_target(there)[0]
        kernels = "none" if target is None else "interpreted" if target == INTERPRETER else "compiled"
        unused = [form.name for form in forms(there) if form.kernel == "hopper" and not hopper_enabled(form.head_dim)]
        return {
            **machine([there]),
            "kernels": kernels,
            "forms": [form.name for form in forms(there)],
            "unused": unused,
        }
    if kind == "form":
        return _form(name, there)
    return beside_sdpa(name, there) if kind == "time" else _scores(there)


def _form(name: str, device: torch.device) -> dict[str, Any]:
    form = next(form for form in forms(device) if form.name == name)
    begun = time.perf_counter()
    found = form.check(device)
    return {
        "status": "right" if found.right else "wrong",
        **found._asdict(),
        "seconds": time.perf_counter() - begun,
    }


def _scores(device: torch.device) -> dict[str, Any]:
    """Scores of tokens whose subspaces are known: that these are found, and every token has its certificate."""
    random = torch.Generator().manual_seed(0)
    each = TOKENS // SUBSPACES
    clean = [torch.randn(each, 10, generator=random) @ torch.randn(10, 256, generator=random) for _ in range(SUBSPACES)]
    tokens = (torch.cat(clean) + 0.5 * torch.randn(TOKENS, 256, generator=random)).to(device)
    config = VideoAnchorConfig(alpha_k=1.0, alpha_v=1.0, n_clusters=SUBSPACES)
    if device.type == "cuda":
        anchor_scores(tokens[::9], config)  # what is compiled or loaded on the way is not timed
    begun = time.perf_counter()
    result = anchor_scores(tokens, config)
    scores, labels = result.scores.cpu(), result.labels.cpu().view(SUBSPACES, each)
    seconds = time.perf_counter() - begun
    found = bool((labels == labels[:, :1]).all()) and len(labels[:, 0].unique()) == SUBSPACES
    bounded = bool(((scores >= 0) & (scores <= 1)).all())
    return {
        "status": "right" if result.converged and found and bounded else "wrong",
        "tokens": TOKENS,
        "seconds": seconds,
        "certified": result.converged,
        "largest_gap": result.residual,
        "tolerance": config.tol,
        "subspaces_found": found,
        "eigengap": result.eigengap,
        "iterations": result.n_iter,
    }
