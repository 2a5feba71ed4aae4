"""Checks of mixed batches over pages: prompts, chunks and single queries in one call, each form of gates and caches."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import videoanchor_triton as va
from benchmarks.attention.helpers.findings import Check, Finding, generator
from videoanchor_triton.kernels.api_paged import E4M3_TARGETS
from videoanchor_triton.kernels.dispatch import triton_target
from videoanchor_triton.kernels.sanity import SINKS, Form
from videoanchor_triton.kernels.sanity_paged import Quantised, attend_paged

PAGES = (1, 8, 48, 64, 256)
HEAD_DIMS = (16, 64, 80, 96, 256)
QUANTISED = {
    "fp8 per tensor": Quantised(torch.float8_e4m3fn, False),
    "fp8 per token": Quantised(torch.float8_e4m3fn, True),
    "int8 per tensor": Quantised(torch.int8, False),
    "int8 per token": Quantised(torch.int8, True),
}
GRAPH = "CUDA graph"


def paged_cases(large: bool) -> Iterator[tuple[str, str, Check]]:
    """(name, gates, check) of each case."""
    for gates, form in _forms(large):
        yield form.name, gates or "none", partial(_checked, form)
    yield GRAPH, "none", partial(_replayed, large)


def absence(name: str, device: torch.device) -> str:
    """Why a case cannot run on a device, or nothing."""
    return "the device has no float8_e4m3fn" if "fp8" in name and triton_target(device)[0] not in E4M3_TARGETS else ""


def _checked(form: Form, device: torch.device) -> Finding:
    found = form.check(device)
    return found.error, found.allowed


def _forms(large: bool) -> Iterator[tuple[str | None, Form]]:
    lengths = (
        ((1, 3000), (200, 500), (0, 40), (1, 1), (37, 90), (5, 0), (20, 12)) if large else ((1, 150), (9, 21), (3, 0))
    )
    fixed: dict[str, Any] = {"head_dim": 128 if large else 16}

    def form(name: str, gates: str | None = "written", page: int = 16, **given: Any) -> tuple[str | None, Form]:
        quantised = given.get("quantised")
        attend = partial(attend_paged, page=page, form=gates, quantised=quantised)
        given = fixed | {"gates": () if gates is None else ("gamma_k", "gamma_v")} | given
        given["call"] = given.get("call", {}) | {"backend": "triton"}
        return gates, Form(name, "paged", attend, given.pop("lengths", lengths), **given)

    options = {"causal": True, "window": 37, "softcap": 5.0}
    for gates in (None, "written", "apart"):
        yield form("mixed batch", gates)
        yield form("window, softcap and sinks", gates, options=options, call={"sinks": SINKS})
    yield form("not causal", options={"causal": False})
    sizes: list[tuple[str, dict[str, Any]]] = [
        ("GQA 7:1", {"heads": (7, 1)}),
        ("GQA 16:1", {"heads": (16, 1)}),
        ("no groups", {"heads": (2, 2)}),
    ]
    sizes += [("single queries", {"lengths": tuple((1, n) for _, n in lengths)})]
    for name, change in sizes:
        yield form(name, **change)
    for page in PAGES if large else PAGES[:2]:
        yield form(f"page size {page}", page=page)
    for head_dim in HEAD_DIMS if large else ():
        yield form(f"D={head_dim}", head_dim=head_dim)
    for dtype in (torch.float16, torch.float32) if large else ():
        yield form(str(dtype)[6:], dtype=dtype)
    for name, quantised in QUANTISED.items():
        # an int8 code has no room for a gate unless its scale takes it
        for gates in (None, "apart") if name == "int8 per tensor" else (None, "written"):
            yield form(name, gates, quantised=quantised)
    yield form("fp8 per tensor", "apart", quantised=QUANTISED["fp8 per tensor"])


def _replayed(large: bool, device: torch.device) -> Finding:
    """A captured call whose lengths, offsets and pages then change gives what a call on these gives, to the bit."""
    random = generator(GRAPH)
    head_dim, page, n_pages, rows = (128, 16, 64, 48) if large else (16, 4, 12, 12)
    q, k, v = (
        torch.randn(*shape, head_dim, generator=random).to(device, torch.bfloat16)
        for shape in ((rows, 4), *[(n_pages, 2, page)] * 2)
    )
    before, after = (
        ([0, 1, rows // 2], [3, page * 5], [0] * 5),
        ([0, rows // 2, rows - 2], [page * 4, 1], range(7, 12)),
    )

    def batch(cu: list[int], lengths: list[int], pages: Any) -> list[torch.Tensor]:
        made = torch.tensor(cu), torch.tensor(lengths), torch.tensor([list(pages), list(pages)])
        return [x.to(device, torch.int32) for x in made]

    held = batch(*before)

    def run(offsets: torch.Tensor, lengths: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return va.anchored_attention_paged(
            q, k, v, cu_seqlens_q=offsets, seqlens_k=lengths, block_table=table, max_seqlen_q=rows, backend="triton",
            return_lse=True,
        )  # fmt: skip

    run(*held)
    changed = batch(*after)
    if device.type == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run(*held)
        for x, y in zip(held, changed, strict=True):
            x.copy_(y)
        graph.replay()
    else:
        found = run(*changed)
    expected = run(*changed)
    equal = all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    return (0.0 if equal else float("inf")), 0.0
