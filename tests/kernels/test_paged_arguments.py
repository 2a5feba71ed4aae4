"""What `anchored_attention_paged` refuses."""

from typing import Any

import pytest
import torch
from paged_batches import Batch

from videoanchor_triton.kernels import validation_paged
from videoanchor_triton.kernels.api_paged import anchored_attention_paged
from videoanchor_triton.kernels.gate_pages import GatePages, gate_pages


def valid(**change: Any) -> dict[str, Any]:
    return Batch("valid", queries=(1, 3), keys=(5, 9), page_size=8, head_dim=16).make(torch.device("cpu")) | change


def integers(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


INVALID: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "q-dimensions": (ValueError, "q must have shape", {"q": torch.zeros(4, 16)}),
    "q-integers": (TypeError, "q must be a floating tensor", {"q": torch.zeros(4, 4, 16).int()}),
    "heads": (ValueError, "q's heads must be a multiple of k_pages' 2 heads, got 3", {"q": torch.zeros(4, 3, 16)}),
    "head-dim": (ValueError, r"k_pages must have shape \(P, Hkv, page, 32\)", {"q": torch.zeros(4, 4, 32)}),
    "dtype": (TypeError, "k_pages must have q's dtype", {"q": torch.zeros(4, 4, 16).half()}),
    "v-pages": (ValueError, "v_pages must have k_pages' shape", {"v_pages": torch.zeros(7, 2, 4, 16)}),
    "offsets-int64": (
        TypeError,
        "cu_seqlens_q must be an int32",
        {"cu_seqlens_q": integers(0, 1, 4, dtype=torch.int64)},
    ),
    "offsets-shape": (ValueError, r"cu_seqlens_q must have shape \(3,\)", {"cu_seqlens_q": integers(0, 4)}),
    "offsets-start": (ValueError, "cu_seqlens_q must not decrease from 0", {"cu_seqlens_q": integers(1, 1, 4)}),
    "offsets-decrease": (ValueError, "cu_seqlens_q must not decrease", {"cu_seqlens_q": integers(0, 3, 2)}),
    "offsets-beyond": (ValueError, "cu_seqlens_q must not decrease", {"cu_seqlens_q": integers(0, 1, 5)}),
    "longest-small": (ValueError, "max_seqlen_q must be at least the longest sequence, 3, got 2", {"max_seqlen_q": 2}),
    "longest-tensor": (TypeError, "max_seqlen_q must be an int", {"max_seqlen_q": torch.tensor(3)}),
    "longest-negative": (ValueError, "max_seqlen_q must be at least 0", {"max_seqlen_q": -1}),
    "lengths-shape": (ValueError, r"seqlens_k must have shape \(B,\)", {"seqlens_k": integers(5, 9)[None]}),
    "lengths-beyond": (
        ValueError,
        "seqlens_k must be within 0 and .* 24 keys, got 25 at 1",
        {"seqlens_k": integers(5, 25)},
    ),
    "lengths-negative": (ValueError, "seqlens_k must be within 0", {"seqlens_k": integers(-1, 9)}),
    "table-shape": (ValueError, "block_table must have shape", {"block_table": integers(0, 1)}),
    "table-empty": (ValueError, "block_table must have shape", {"block_table": torch.zeros(2, 0, dtype=torch.int32)}),
    "table-int64": (TypeError, "block_table must be an int32", {"block_table": torch.zeros(2, 3).long()}),
    "table-page": (
        ValueError,
        "block_table must name pages within 0 and 5",
        {"block_table": torch.full((2, 3), 6).int()},
    ),
    "table-device": (ValueError, "block_table must be on q's device", {"block_table": integers(0).to("meta")}),
    "gates-tensor": (TypeError, "gate_pages must be GatePages", {"gate_pages": torch.ones(6, 1, 8)}),
    "gates-form": (
        ValueError,
        "gate_pages of the form 'apart'",
        {"gate_pages": GatePages(torch.ones(6, 1, 8), "apart")},
    ),
    "gates-size": (ValueError, "gate_pages of the form", {"gate_pages": gate_pages(6, 4, "cpu")}),
    "gates-heads": (ValueError, "gate_pages of the form", {"gate_pages": gate_pages(6, 8, "cpu", heads=4)}),
    "gates-device": (ValueError, "gate_pages must be on", {"gate_pages": gate_pages(6, 8, "meta")}),
    "sinks-shape": (ValueError, "sinks must have shape", {"sinks": torch.zeros(2)}),
    "sinks-integers": (TypeError, "sinks must be a floating", {"sinks": torch.zeros(4).int()}),
    "scale-of-no-quantised-cache": (ValueError, "v_scale must be None", {"v_scale": torch.ones(1)}),
    "out-shape": (ValueError, "out must have q's shape", {"out": torch.zeros(4, 2, 16)}),
    "out-columns": (ValueError, "out must have q's shape", {"out": torch.zeros(4, 4, 32)[..., ::2]}),
    "out-dtype": (TypeError, "out must have q's dtype", {"out": torch.zeros(4, 4, 16).half()}),
    "window-not-causal": (ValueError, "window needs causal=True", {"window": 2, "causal": False}),
    "scale": (ValueError, "scale must be finite", {"scale": -1.0}),
    "softcap": (ValueError, "softcap must be", {"softcap": 0.0}),
    "grad": (
        ValueError,
        "anchored_attention_paged has no backward, and q requires grad",
        {"q": torch.zeros(4, 4, 16).requires_grad_()},
    ),
    "backend": (ValueError, "backend must be one of", {"backend": "flash"}),
    "hopper": (ValueError, "backend='hopper' is for prefill and cannot take calls over pages", {"backend": "hopper"}),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_arguments_are_refused(name: str) -> None:
    kind, message, change = INVALID[name]
    with pytest.raises(kind, match=message):
        anchored_attention_paged(**valid(**({"backend": "sdpa"} | change)))


READ_ANYWAY = ("offsets-start", "lengths-beyond", "table-page")


@pytest.mark.parametrize("name", READ_ANYWAY)
def test_debug_looks_at_values_anywhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation_paged, "values_are_free", lambda _: False)
    monkeypatch.setenv(validation_paged.DEBUG, "1")
    kind, message, change = INVALID[name]
    with pytest.raises(kind, match=message):
        anchored_attention_paged(**valid(**change), backend="triton")
    monkeypatch.delenv(validation_paged.DEBUG)
    with pytest.raises(kind, match=message):  # which read them anyway
        anchored_attention_paged(**valid(**change), backend="sdpa")
