"""The operators within torch.compile: what a CUDA graph asks of them, their fakes on cards, and inductor's code."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from videoanchor_triton import anchored_attention, anchored_attention_decode, anchored_attention_varlen
from videoanchor_triton.kernels.ops import anchored_attention_op, backward_op, varlen_op
from videoanchor_triton.kernels.ops_cache import decode_op


@pytest.mark.parametrize("operator", [anchored_attention_op, varlen_op, decode_op, backward_op], ids=str)
def test_a_cuda_graph_may_hold_the_operator(operator: Any) -> None:
    tags = operator._opoverload.tags
    assert torch.Tag.pt2_compliant_tag in tags
    assert torch.Tag.cudagraph_unsafe not in tags


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def bnhd(*shape: int) -> torch.Tensor:
    """(B, H, N, D) as a projection makes it: tokens before heads in memory."""
    batch, heads, tokens, width = shape
    return torch.randn(batch, tokens, heads, width).transpose(1, 2)


def broadcast(*shape: int) -> torch.Tensor:
    return torch.randn(1, 1, *shape[2:]).expand(shape)


def columns(*shape: int) -> torch.Tensor:
    """(B, H, N, D) with elements of a row apart."""
    return torch.randn(*shape[:2], shape[3], shape[2]).transpose(2, 3)


LAYOUTS = [torch.randn, bnhd, broadcast, columns]


def calls(layout: Any) -> dict[Any, tuple[Any, ...]]:
    """Arguments of each operator whose tensors have a layout."""
    q, k = layout(2, 4, 18, 16), layout(2, 2, 20, 16)
    gate, mask = torch.rand(2, 20), torch.rand(2, 20) > 0.2
    packed_q, packed_k = (layout(1, *x.shape[1:])[0].transpose(0, 1) for x in (q, k))
    offsets = ints(0, 7, 18), ints(0, 9, 20)
    dense = q, k, k, gate, gate, mask
    found = anchored_attention_op(*dense, 0.25, True, None, None, False, False, False)
    upstream = layout(2, 4, 18, 16), torch.randn(2, 4, 18)
    cache = layout(2, 2, 20, 16) if layout is not columns else bnhd(2, 2, 20, 16)
    return {
        anchored_attention_op: (*dense, 0.25, True, 5, None, True, False, False),
        varlen_op: (
            packed_q,
            packed_k,
            packed_k,
            *offsets,
            11,
            11,
            gate[0],
            None,
            0.25,
            True,
            None,
            None,
            False,
            False,
        ),
        decode_op: (layout(2, 4, 3, 16), cache, cache, ints(20, 5), None, gate, gate, 0.25, True, None, None),
        backward_op: (*dense, *found, *upstream, 0.25, True, None, None, False, None, None, None, None),
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_fakes_on_another_card_say_what_the_operators_return(layout: Any) -> None:
    for operator, arguments in calls(layout).items():
        real = operator(*arguments)
        with FakeTensorMode() as mode:
            card = torch.device("cuda", 1)
            faked = [
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=card)
                if isinstance(x, torch.Tensor)
                else x
                for x in arguments
            ]
            fake = operator(*faked)
            assert mode is not None
        for found, expected in zip(fake, real, strict=True):
            assert found.device == card
            assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)


def attend_thrice(
    q: torch.Tensor, k: torch.Tensor, gamma_k: torch.Tensor, offsets_q: torch.Tensor, offsets_k: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Of one sequence (1, H, N, D): dense, packed, and the last query over a cache."""
    dense, lse = anchored_attention(
        q, k, k.sin(), gamma_k=gamma_k, causal=True, return_lse=True, backend="triton", gate_form="post-exp"
    )
    packed = anchored_attention_varlen(
        q[0].transpose(0, 1),
        k[0].transpose(0, 1),
        k[0].transpose(0, 1),
        offsets_q,
        offsets_k,
        q.shape[2],
        k.shape[2],
        gamma_k=gamma_k.cos().abs(),
        backend="triton",
    )
    with torch.no_grad():
        last = anchored_attention_decode(q[:, :, -1:], k, k, offsets_k[1:], gamma_k=gamma_k * 2, backend="triton")
    return dense.exp(), lse.sin(), packed * 2, last + 1


@pytest.mark.timeout(900)  # a busy machine compiles C++ for minutes
def test_inductor_compiles_once_for_all_lengths(device: torch.device) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(attend_thrice, fullgraph=True, dynamic=True, backend=counter)
    for queries, keys in ((17, 20), (25, 31)):
        inputs = [torch.randn(1, 4, queries, 16), torch.randn(1, 2, keys, 16), 1 + torch.rand(keys)]
        inputs = [x.to(device).requires_grad_() for x in inputs]
        offsets = [ints(0, queries).to(device), ints(0, keys).to(device)]
        found, expected = compiled(*inputs, *offsets), attend_thrice(*inputs, *offsets)
        torch.testing.assert_close(found, expected)
        gradients = (
            torch.autograd.grad(torch.stack([x.sum() for x in out[:3]]).sum(), inputs) for out in (found, expected)
        )
        torch.testing.assert_close(*gradients)
    assert counter.frame_count == 1
    torch.compiler.reset()
