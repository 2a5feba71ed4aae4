"""What `anchored_attention_varlen` refuses."""

from typing import Any

import pytest
import torch

from videoanchor_triton.kernels import validation
from videoanchor_triton.kernels.api import anchored_attention_varlen

NAN, INF = float("nan"), float("inf")


def changed(**change: Any) -> dict[str, Any]:
    """Valid arguments of two sequences, 2 + 3 queries and 4 + 3 keys, with a change."""
    q, k = torch.zeros(5, 4, 16), torch.zeros(7, 2, 16)
    offsets = {"cu_seqlens_q": marks(0, 2, 5), "cu_seqlens_k": marks(0, 4, 7)}
    return {"q": q, "k": k, "v": k, **offsets, "max_seqlen_q": 3, "max_seqlen_k": 4} | change


def marks(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


INVALID: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "q-dimensions": (ValueError, "q must have", {"q": torch.zeros(1, 5, 4, 16)}),
    "q-integers": (TypeError, "q must be a floating tensor", {"q": torch.zeros(5, 4, 16, dtype=torch.long)}),
    "k-dtype": (TypeError, "k must have q's dtype", {"k": torch.zeros(7, 2, 16).half()}),
    "k-head-dim": (ValueError, "k must have shape", {"k": torch.zeros(7, 2, 8), "v": torch.zeros(7, 2, 8)}),
    "v-shape": (ValueError, "v must have k's shape", {"v": torch.zeros(6, 2, 16)}),
    "heads": (ValueError, "heads must be a multiple", {"q": torch.zeros(5, 3, 16)}),
    "marks-list": (TypeError, "cu_seqlens_q must be a tensor", {"cu_seqlens_q": [0, 2, 5]}),
    "marks-int64": (TypeError, "cu_seqlens_q must be .*int32", {"cu_seqlens_q": marks(0, 2, 5, dtype=torch.int64)}),
    "marks-floats": (TypeError, "cu_seqlens_k must be .*int32", {"cu_seqlens_k": torch.tensor([0.0, 4, 7])}),
    "marks-dimensions": (ValueError, "cu_seqlens_q must have shape", {"cu_seqlens_q": marks(0, 2, 5)[None]}),
    "marks-none": (ValueError, "cu_seqlens_q must have shape", {"cu_seqlens_q": marks()}),
    "marks-lengths-differ": (ValueError, "cu_seqlens_k must have", {"cu_seqlens_k": marks(0, 4, 7, 7)}),
    "marks-device": (ValueError, "cu_seqlens_q must be on q's device", {"cu_seqlens_q": marks(0, 2, 5).to("meta")}),
    "marks-not-from-0": (ValueError, "cu_seqlens_q must", {"cu_seqlens_q": marks(1, 2, 5)}),
    "marks-beyond-the-tokens": (ValueError, "cu_seqlens_k must", {"cu_seqlens_k": marks(0, 4, 8)}),
    "marks-before-the-end": (ValueError, "cu_seqlens_k must", {"cu_seqlens_k": marks(0, 4, 6)}),
    "marks-decrease": (ValueError, "cu_seqlens_q must", {"cu_seqlens_q": marks(0, 6, 5), "max_seqlen_q": 6}),
    "max-seqlen-tensor": (TypeError, "max_seqlen_q must be an int", {"max_seqlen_q": torch.tensor(3)}),
    "max-seqlen-bool": (TypeError, "max_seqlen_k must be an int", {"max_seqlen_k": True}),
    "max-seqlen-float": (TypeError, "max_seqlen_k must be an int", {"max_seqlen_k": 4.0}),
    "max-seqlen-negative": (ValueError, "max_seqlen_q must be", {"max_seqlen_q": -1}),
    "max-seqlen-q-too-small": (ValueError, "max_seqlen_q must be", {"max_seqlen_q": 2}),
    "max-seqlen-k-too-small": (ValueError, "max_seqlen_k must be", {"max_seqlen_k": 3}),
    "gate-too-short": (ValueError, "gamma_k must have shape", {"gamma_k": torch.ones(6)}),
    "gate-too-long": (ValueError, "gamma_v must have shape", {"gamma_v": torch.ones(8)}),
    "gate-of-3-heads": (ValueError, r"gamma_k must have shape .*\(7, 2\) or \(7, 4\)", {"gamma_k": torch.ones(7, 3)}),
    "gate-heads-first": (ValueError, "gamma_k must have shape", {"gamma_k": torch.ones(2, 7)}),
    "gate-integers": (TypeError, "gamma_k must be a floating", {"gamma_k": torch.ones(7, dtype=torch.long)}),
    "gate-device": (ValueError, "gamma_k must be on q's device", {"gamma_k": torch.ones(7, device="meta")}),
    "gate-negative": (ValueError, "gamma_k must be finite", {"gamma_k": -torch.ones(7)}),
    "gate-nan": (ValueError, "gamma_v must be finite", {"gamma_v": torch.full((7,), NAN)}),
    "gate-0-post-exp": (ValueError, "post-exp", {"gamma_k": torch.zeros(7), "gate_form": "post-exp"}),
    "gamma-q-of-keys": (ValueError, "gamma_q must have shape", {"gamma_q": torch.ones(7)}),
    "gamma-q-of-kv-heads": (ValueError, "gamma_q must have shape", {"gamma_q": torch.ones(5, 2)}),
    "scale": (ValueError, "scale must be finite", {"scale": -1.0}),
    "window-not-causal": (ValueError, "window needs causal=True", {"window": 2}),
    "window-0": (ValueError, "window must be", {"window": 0, "causal": True}),
    "softcap-0": (ValueError, "softcap must be", {"softcap": 0.0}),
    "softcap-inf": (ValueError, "softcap must be", {"softcap": INF}),
    "softcap-nan": (ValueError, "softcap must be", {"softcap": NAN}),
    "backend": (ValueError, "backend must be one of", {"backend": "flash"}),
    "gate-form": (ValueError, "gate_form must be one of", {"gate_form": "pre-exp"}),
}


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
@pytest.mark.parametrize("name", INVALID)
def test_invalid_arguments_are_refused(name: str, backend: str) -> None:
    kind, message, change = INVALID[name]
    with pytest.raises(kind, match=message):
        anchored_attention_varlen(**changed(**({"backend": backend} | change)))


OFFSETS = [name for name in INVALID if name.startswith("marks-") and INVALID[name][1].endswith("must")]
OFFSETS += ["max-seqlen-q-too-small", "max-seqlen-k-too-small"]


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("name", OFFSETS)
def test_offsets_that_are_read_anyway_are_checked(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU too, where the public function does not look at values."""
    monkeypatch.setattr(validation, "values_are_free", lambda _: False)
    kind, message, change = INVALID[name]
    with pytest.raises(kind, match=message):
        anchored_attention_varlen(**changed(**({"backend": backend} | change)))
