"""The attention that visual tokens get from the text after them, before and after the gate, by layer and head."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from unittest import mock

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ...integrations.errors import InputError
from ...integrations.transformers import attention
from ...kernels.api import anchored_attention
from .palette import COLOURS
from .plain_text import plain_text, wrapped
from .table import Row

_OF_THE_GATE = ("log_gamma_k", "gamma_v", "gamma_q", "return_lse")
"""What the measurement chooses itself; gamma_q cancels in a share."""


@dataclass(frozen=True, eq=False)
class VisualShare:
    """Attention in one layer, mean over queries: of the same queries and keys without and with the gate's factors.

    Args:
        layer: its number, from 0.
        ungated, gated: (Hq,) float64 in [0, 1], the share of each head that falls on visual tokens.
        levels: (2, 1 + Hq, n_visual) uint8: where it falls, without the gate and with it, for the mean of the heads and
            for each head, as 255 times the square root of its part of `top`.
        top: (1 + Hq,) float64, the largest attention that a visual token gets, without the gate or with it.
    """

    layer: int
    ungated: np.ndarray
    gated: np.ndarray
    levels: np.ndarray
    top: np.ndarray

    @classmethod
    def of_maps(cls, layer: int, maps: np.ndarray) -> Self:
        """
        Args:
            maps: (2, Hq, n_visual) attention on each visual token.
        """
        ungated, gated = maps.sum(-1, dtype=np.float64)
        maps = np.concatenate([maps.mean(1, keepdims=True), maps], 1)
        top = maps.max((0, 2))
        levels = (255 * np.sqrt(maps / np.where(top > 0, top, 1)[:, None])).round().astype(np.uint8)
        return cls(layer, ungated, gated, levels, top.astype(np.float64))


@dataclass(eq=False)
class SharesRecord:
    """What `record_visual_share` collects: the layers, the queries and keys of the prompt, and the visual keys."""

    layers: list[VisualShare] = field(default_factory=list)
    n_queries: int = 0
    n_keys: int = 0
    n_visual: int = 0


def attention_by_key(q: Tensor, k: Tensor, v: Tensor, *, log_gamma_k: Tensor | None = None, **options: Any) -> Tensor:
    """How much of its softmax each head puts on each key, mean over the queries.

    It is the gradient of the log-sum-exp by the logarithm of the key's factor, so that nothing of queries x keys is
    built, and what `anchored_attention` can take can be measured.

    Args:
        q: (B, Hq, M, D); k, v: (B, Hkv, N, D).
        log_gamma_k: (N',) or (B, N'), N' <= N; options: as in `anchored_attention`.

    Returns:
        (B, Hq, N) float32, of sum 1 over the keys where each query sees one.
    """
    with torch.inference_mode(False), torch.enable_grad():
        q, k, v = (tensor.detach().clone() for tensor in (q, k, v))  # inference tensors take part in no gradient
        bias = torch.zeros(*q.shape[:2], k.shape[2], device=q.device)
        if log_gamma_k is not None:
            bias[..., : log_gamma_k.shape[-1]] = log_gamma_k.detach().reshape(-1, 1, log_gamma_k.shape[-1])
        bias.requires_grad_()
        _, lse = anchored_attention(q, k, v, log_gamma_k=bias, return_lse=True, **options)
        (found,) = torch.autograd.grad(lse.mean(-1).sum(), bias)
    return found


@contextmanager
def record_visual_share(visual: Tensor) -> Iterator[SharesRecord]:
    """While this is open, the gated attention of each layer of a prefill is measured; nothing of it is kept.

    Measured are the queries after the last visual token, of a batch of one row. A module that knows its `layer_idx`
    tells the layer. Not for several threads at once.

    Args:
        visual: (N,) bool, True at the visual tokens of the prompt.
    """
    n_after = len(visual) - 1 - int(visual.nonzero()[-1])
    record = SharesRecord(n_queries=n_after, n_keys=len(visual), n_visual=int(visual.sum()))
    layer = 0

    def entered(module: nn.Module, _args: Any) -> None:
        nonlocal layer
        layer = getattr(module, "layer_idx", layer)

    def measured(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if q.shape[2] == k.shape[2] == len(visual):
            if options.get("return_lse"):
                raise InputError("attention with sinks is not measured: leave 'attention' out of --what")
            rest = {name: value for name, value in options.items() if name not in _OF_THE_GATE}
            here = visual.to(q.device)
            maps = [
                attention_by_key(q[:, :, -n_after:], k, v, log_gamma_k=gate, **rest)[0, :, here].float().cpu().numpy()
                for gate in (None, options.get("log_gamma_k"))
            ]
            record.layers.append(VisualShare.of_maps(layer, np.stack(maps)))
        return anchored_attention(q, k, v, **options)

    with register_module_forward_pre_hook(entered), mock.patch.object(attention, "anchored_attention", measured):
        yield record


@plain_text()
def draw(path: Path, record: SharesRecord, caption: str) -> None:
    """Draws both shares over the layers: the mean over heads, and between which values the heads lie. The suffix of
    `path` is the format."""
    layers = np.array([one.layer for one in record.layers])
    figure = Figure((5.6, 4.2), layout="constrained")
    axis = figure.subplots()
    styles = (("before the gate", "ungated", COLOURS[1], "o", "--"), ("after the gate", "gated", COLOURS[5], "s", "-"))
    among = 100 * record.n_visual / record.n_keys
    low = high = among
    for name, which, colour, marker, line in styles:
        share = 100 * np.stack([getattr(one, which) for one in record.layers])
        low, high = min(low, share.min()), max(high, share.max())
        axis.plot(
            layers, share.mean(1), line, color=colour, marker=marker, markersize=4, label=f"{name}, mean of heads"
        )
        band = f"{name}, range of heads"
        axis.fill_between(layers, share.min(1), share.max(1), color=colour, alpha=0.2, linewidth=0, label=band)
    axis.axhline(among, color="0.35", linestyle=":", linewidth=1, label="share of visual tokens in the prompt")
    margin = max(0.06 * (high - low), 0.5)
    axis.set_ylim(low - margin, high + margin)
    axis.set_yticks([tick for tick in axis.get_yticks() if 0 <= tick <= 100 and low - margin <= tick <= high + margin])
    axis.set_xlim(layers.min() - 0.5, layers.max() + 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_xlabel("decoder layer")
    axis.set_ylabel("attention on visual tokens (%)")
    said = f"attention of the {record.n_queries} text tokens after the video"
    axis.set_title(f"{wrapped(caption, 64)}\n{said}", fontsize=9)
    handles = [*axis.get_lines(), *axis.collections]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False, handlelength=3)
    figure.savefig(path, dpi=300)


def rows(record: SharesRecord) -> Iterator[Row]:
    """The names of the columns, then a row for each layer and head, and one with head "mean" for each layer."""
    yield "layer", "head", "share_before_gate", "share_after_gate"
    for one in record.layers:
        for head, shares in enumerate(zip(one.ungated, one.gated, strict=True)):
            yield one.layer, head, *shares
        yield one.layer, "mean", one.ungated.mean(), one.gated.mean()


def summary(record: SharesRecord) -> dict[str, float]:
    """What was measured, and the mean shares over layers, heads and queries."""
    return {
        "layers": len(record.layers),
        "queries": record.n_queries,
        "share_before_gate": float(np.mean([one.ungated for one in record.layers])),
        "share_after_gate": float(np.mean([one.gated for one in record.layers])),
    }
