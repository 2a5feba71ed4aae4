"""The share of attention that visual tokens get from the text after them, before and after the gate, by layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ...integrations.errors import InputError
from ...integrations.transformers import attention
from ...kernels.api import anchored_attention
from .palette import COLOURS
from .plain_text import plain_text
from .table import Row

_OF_THE_GATE = ("log_gamma_k", "gamma_v", "gamma_q", "return_lse")
"""What the measurement chooses itself; gamma_q cancels in a share."""


@dataclass(frozen=True, eq=False)
class VisualShare:
    """Shares of attention in one layer.

    Args:
        layer: its number, from 0.
        ungated, gated: (Hq,) float64 in [0, 1], the share of each head, mean over queries: of the same queries and
            keys without and with the gate's factors.
    """

    layer: int
    ungated: np.ndarray
    gated: np.ndarray


@dataclass(eq=False)
class SharesRecord:
    """What `record_visual_share` collects: the layers, the queries and keys of the prompt, and the visual keys."""

    layers: list[VisualShare] = field(default_factory=list)
    n_queries: int = 0
    n_keys: int = 0
    n_visual: int = 0


def visual_share(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visual: Tensor,
    *,
    log_gamma_k: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The part of each query's softmax that falls on the visual keys: exp(lse over them - lse over all keys).

    Nothing of queries x keys is built: the two log-sum-exps come from `anchored_attention`.

    Args:
        q: (B, Hq, M, D); k, v: (B, Hkv, N, D).
        visual: (N,) bool, True at visual keys.
        log_gamma_k, key_padding_mask, options: as in `anchored_attention`.

    Returns:
        (B, Hq, M) float32; 0 for a query that sees no visual key, NaN for one that sees no key.
    """
    seen = visual.expand(k.shape[0], -1)
    only = seen if key_padding_mask is None else seen & key_padding_mask
    lse_all, lse_visual = (
        anchored_attention(q, k, v, log_gamma_k=log_gamma_k, key_padding_mask=mask, return_lse=True, **options)[1]
        for mask in (key_padding_mask, only)
    )
    return (lse_visual - lse_all).exp()


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
            shares = (
                visual_share(q[:, :, -n_after:], k, v, here, log_gamma_k=gate, **rest).double().mean((0, 2))
                for gate in (None, options.get("log_gamma_k"))
            )
            record.layers.append(VisualShare(layer, *(share.cpu().numpy() for share in shares)))
        return anchored_attention(q, k, v, **options)

    with register_module_forward_pre_hook(entered), mock.patch.object(attention, "anchored_attention", measured):
        yield record


@plain_text()
def draw(path: Path, record: SharesRecord, video_name: str) -> None:
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
    axis.set_title(f"{video_name}\nattention of the {record.n_queries} text tokens after the video", fontsize=10)
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
