"""torch.func's transforms and forward-mode differentiation: right, or one clear error."""

import math
from typing import Any

import pytest
import torch
from torch.autograd.forward_ad import dual_level, make_dual

from videoanchor_triton.kernels.api import anchored_attention, anchored_attention_varlen
from videoanchor_triton.kernels.api_cache import anchored_attention_decode
from videoanchor_triton.kernels.validation import transforms

GATED = {"gamma_k": 1 + torch.arange(20) / 10, "gamma_v": 2 - torch.arange(20) / 20}
TRANSFORMED: dict[str, dict[str, Any]] = {
    "plain": {},
    "gated": GATED,
    "masked": GATED | {"causal": True, "key_padding_mask": torch.arange(20)[None].expand(2, -1) > 2},
    "softcap": GATED | {"softcap": 2.0},
    "log": {"log_gamma_k": torch.arange(80.0).view(1, 4, 20).expand(2, -1, -1) / 40, "gamma_v": GATED["gamma_v"]},
}


def transformed(name: str, backend: str, device: torch.device) -> tuple[Any, list[torch.Tensor]]:
    options = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in TRANSFORMED[name].items()}
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, h, 20, 16, generator=generator).to(device) for h in (4, 2, 2))

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        gated: dict[str, Any] = options | {key: 1 + alpha * gate for key, gate in options.items() if "gamma" in key}
        out, lse = anchored_attention(q, k, v, **gated, return_lse=True, backend=backend)
        return out.square().sum() + lse.masked_fill(lse == -math.inf, 0).sum()

    return loss, [q, k, v, torch.tensor([0.5, 1.0, 2.0], device=device)]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("backend", ["triton", "sdpa", "reference"])
@pytest.mark.parametrize("name", TRANSFORMED)
def test_vmap_is_a_loop(name: str, backend: str, device: torch.device) -> None:
    loss, inputs = transformed(name, backend, device)
    looped = torch.stack([loss(*each) for each in zip(*inputs, strict=True)])
    torch.testing.assert_close(torch.func.vmap(loss)(*inputs), looped)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("name", TRANSFORMED)
def test_func_grad_is_that_of_autograd(name: str, backend: str, device: torch.device) -> None:
    loss, inputs = transformed(name, backend, device)
    every = tuple(range(3 if name == "plain" else 4))
    looped = []
    for each in zip(*inputs, strict=True):
        leaves = [x.clone().requires_grad_() for x in each]
        looped.append(torch.autograd.grad(loss(*leaves), leaves[: len(every)]))
    found = torch.func.vmap(torch.func.grad(loss, every))(*inputs)
    torch.testing.assert_close(found, tuple(torch.stack(x) for x in zip(*looped, strict=True)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["plain", "gated"])
def test_triton_takes_no_derivative_that_it_would_drop(name: str, device: torch.device) -> None:
    """torch.func's transforms, and forward mode, whose tangents would become 0 without a word."""
    loss, inputs = transformed(name, "triton", device)
    first = tuple(x[0] for x in inputs)
    refusal = r"torch.func differentiates here.* use backend='sdpa'"
    with pytest.raises(ValueError, match=refusal):
        torch.func.grad(loss)(*first)
    with pytest.raises(ValueError, match=refusal):
        torch.func.vmap(torch.func.grad(loss))(*inputs)
    with pytest.raises(ValueError, match=refusal):
        torch.func.jvp(lambda q: loss(q, *first[1:]), first[:1], first[:1])
    with dual_level(), pytest.raises(ValueError, match="a tensor is dual"):
        loss(make_dual(first[0], first[0]), *first[1:])


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_lengths_under_vmap_are_refused_where_the_host_reads_them(backend: str, device: torch.device) -> None:
    q = torch.randn(2, 1, 2, 1, 16, device=device)
    lengths = torch.ones(2, 1, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"cache_seqlens must be the same in all calls of torch.func.vmap"):
        torch.func.vmap(lambda q, n: anchored_attention_decode(q, q, q, n, backend=backend))(q, lengths)
    offsets = torch.tensor([[0, 1], [0, 1]], dtype=torch.int32, device=device)
    with pytest.raises(
        ValueError, match=r"cu_seqlens_q and cu_seqlens_k must be the same in all calls of torch.func.vmap"
    ):
        torch.func.vmap(lambda q, n: anchored_attention_varlen(q[0].mT, q[0].mT, q[0].mT, n, n, 1, 1, backend=backend))(
            q.mT, offsets
        )


def test_torch_names_its_transforms() -> None:
    """`transforms` reads a private name of torch: a release that moves it says so here."""
    seen: list[list[str]] = [transforms()]

    def watched(x: torch.Tensor) -> torch.Tensor:
        seen.append(transforms())
        return x.sum()

    torch.func.vmap(torch.func.grad(watched))(torch.ones(2, 3))
    torch.func.jvp(watched, (torch.ones(3),), (torch.ones(3),))
    assert seen == [[], ["Vmap", "Grad"], ["Jvp"]]
