"""What `anchored_attention_decode` refuses."""

from typing import Any

import pytest
import torch

from videoanchor_triton.kernels import validation
from videoanchor_triton.kernels.api_cache import anchored_attention_decode


def changed(**change: Any) -> dict[str, Any]:
    """Valid arguments of two sequences of 9 and 0 keys in contiguous caches of 32, with a change."""
    caches = torch.zeros(2, 2, 32, 16)
    lengths = torch.tensor([9, 0], dtype=torch.int32)
    return {"q": torch.zeros(2, 4, 1, 16), "k_cache": caches, "v_cache": caches, "cache_seqlens": lengths} | change


def paged(page_size: int = 16, **change: Any) -> dict[str, Any]:
    """The same in three pages, two a sequence."""
    pages = torch.zeros(3, 2, page_size, 16)
    table = torch.tensor([[2, -1], [-1, -1]], dtype=torch.int32)
    return {"k_cache": pages, "v_cache": pages, "block_table": table} | change


def integers(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


INVALID: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "q-dimensions": (ValueError, "q must have 4 dimensions", {"q": torch.zeros(4, 1, 16)}),
    "no-queries": (ValueError, "q must have at least 1 query", {"q": torch.zeros(2, 4, 0, 16)}),
    "cache-dimensions": (ValueError, "k_cache must have 4 dimensions", {"k_cache": torch.zeros(2, 32, 16)}),
    "cache-dtype": (TypeError, "k_cache must have q's dtype", {"k_cache": torch.zeros(2, 2, 32, 16).half()}),
    "cache-batch": (ValueError, "k_cache must have", {k: torch.zeros(3, 2, 32, 16) for k in ("k_cache", "v_cache")}),
    "cache-head-dim": (ValueError, "k_cache must have", {k: torch.zeros(2, 2, 32, 8) for k in ("k_cache", "v_cache")}),
    "v-cache-shape": (ValueError, "v_cache must have", {"v_cache": torch.zeros(2, 2, 31, 16)}),
    "heads": (ValueError, "heads must be a multiple", {"q": torch.zeros(2, 3, 1, 16)}),
    "lengths-list": (TypeError, "cache_seqlens must be a tensor", {"cache_seqlens": [9, 0]}),
    "lengths-int64": (TypeError, "cache_seqlens must be .*int32", {"cache_seqlens": integers(9, 0, dtype=torch.int64)}),
    "lengths-shape": (ValueError, "cache_seqlens must have shape", {"cache_seqlens": integers(9)}),
    "lengths-scalar": (ValueError, "cache_seqlens must have shape", {"cache_seqlens": torch.tensor(9).int()}),
    "lengths-device": (ValueError, "cache_seqlens must be on q's", {"cache_seqlens": integers(9, 0).to("meta")}),
    "lengths-negative": (ValueError, "cache_seqlens must", {"cache_seqlens": integers(9, -1)}),
    "lengths-beyond-the-cache": (ValueError, "cache_seqlens must", {"cache_seqlens": integers(33, 1)}),
    "lengths-beyond-the-pages": (ValueError, "cache_seqlens must", paged(cache_seqlens=integers(33, 1))),
    "table-int64": (TypeError, "block_table must be .*int32", paged(block_table=torch.zeros(2, 2).long())),
    "table-batch": (ValueError, "block_table must have shape", paged(block_table=torch.zeros(3, 2).int())),
    "table-dimensions": (ValueError, "block_table must have shape", paged(block_table=integers(2, 0))),
    "table-device": (ValueError, "block_table must be on q's", paged(block_table=torch.zeros(2, 2).int().to("meta"))),
    "table-page-missing": (ValueError, "block_table must", paged(block_table=integers(3, 0, 0, 0).view(2, 2))),
    "table-page-negative": (ValueError, "block_table must", paged(block_table=integers(-1, 0, 0, 0).view(2, 2))),
    "pages-of-0": (ValueError, "the page size, k_cache.shape.2., must be at least 1", paged(0)),
    "gate-too-long": (ValueError, "gamma_k must have shape", {"gamma_k": torch.ones(33)}),
    "gate-longer-than-pages": (ValueError, "gamma_k must have shape", paged(gamma_k=torch.ones(33))),
    "gate-batch": (ValueError, "gamma_v must have shape", {"gamma_v": torch.ones(3, 9)}),
    "gate-of-3-heads": (ValueError, "gamma_k must have shape", {"gamma_k": torch.ones(2, 3, 9)}),
    "gate-integers": (TypeError, "gamma_v must be a floating", {"gamma_v": torch.ones(9).long()}),
    "gate-negative": (ValueError, "gamma_k must be finite", {"gamma_k": -torch.ones(9)}),
    "gamma-q-length": (ValueError, "gamma_q must have shape", {"gamma_q": torch.ones(2, 2)}),
    "scale": (ValueError, "scale must be finite", {"scale": float("inf")}),
    "window-not-causal": (ValueError, "window needs causal=True", {"window": 2, "causal": False}),
    "softcap": (ValueError, "softcap must be", {"softcap": -1.0}),
    "backend": (ValueError, "backend must be one of", {"backend": "flash"}),
}


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
@pytest.mark.parametrize("name", INVALID)
def test_invalid_arguments_are_refused(name: str, backend: str) -> None:
    kind, message, change = INVALID[name]
    with pytest.raises(kind, match=message):
        anchored_attention_decode(**changed(**({"backend": backend} | change)))


READ_ANYWAY = [name for name in INVALID if name.startswith(("lengths-beyond", "lengths-neg", "table-page"))]


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("name", READ_ANYWAY)
def test_lengths_and_pages_that_are_read_anyway_are_checked(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU too, where the public function does not look at values."""
    monkeypatch.setattr(validation, "values_are_free", lambda _: False)
    kind, message, change = INVALID[name]
    with pytest.raises(kind, match=message):
        anchored_attention_decode(**changed(**({"backend": backend} | change)))
