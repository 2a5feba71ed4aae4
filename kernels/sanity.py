"""One small call of each form of the kernels, judged by the dense reference in fp64: right or wrong, in seconds.

The list for `videoanchor check` and for the first section of `benchmarks/gpu_check.py`. A form computes one or two
sequences, each of which is a dense call by itself; reference and eager form run on the CPU, so that nothing of the
device judges the device.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .api import anchored_attention, anchored_attention_varlen
from .api_cache import anchored_attention_decode
from .dispatch import triton_target
from .hopper import gluon_refusal
from .merge import merge_attention
from .reference import reference_attention
from .sanity_paged import Quantised, Sequence, attend_paged, with_sinks
from .tiles import E4M3_TARGETS, INTERPRETER
from .tolerance import Result, allowed_error, compare_results, eager_attention, error, fp32_roundings

PAGE_SIZE = 16
Attend = Callable[[list[Sequence], dict[str, Any]], list[Result]]


class Finding(NamedTuple):
    """The result of a form that uses up most of what it may be off by."""

    what: str
    error: float
    allowed: float

    @property
    def right(self) -> bool:
        return self.error <= self.allowed  # NaN is not


@dataclass(frozen=True)
class Form:
    """A form of the kernels, and the call that tries it.

    Attributes:
        name: for people; unique in a list.
        kernel: what is at fault where it fails: "prefill", "packed", "decode", "paged", "merge", "backward", "hopper",
            "sdpa".
        attend: calls the package for some sequences.
        lengths: queries and keys of each sequence. Queries are the last ones of their sequence.
        gates: those of gamma_k and gamma_v that are there.
        options: causal, window, softcap: what the reference takes too.
        call: what the package alone takes: backend, gate_form, and sinks as numbers.
        gradients: of q, k, v and the gates are compared, not the results.
        quantised: K and V are such as a cache of it holds, and the gates are powers of two.
        heads: of queries, and of keys and values.
    """

    name: str
    kernel: str
    attend: Attend
    lengths: tuple[tuple[int, int], ...]
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    gates: tuple[str, ...] = ("gamma_k", "gamma_v")
    options: dict[str, Any] = field(default_factory=lambda: {"causal": True})
    call: dict[str, Any] = field(default_factory=dict)
    padded: bool = False
    gradients: bool = False
    quantised: Quantised | None = None
    heads: tuple[int, int] = (4, 2)

    def sequences(self) -> list[Sequence]:
        """What is attended, on the CPU."""
        random = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        return [self._sequence(*length, random) for length in self.lengths]

    def _sequence(self, queries: int, keys: int, random: torch.Generator) -> Sequence:
        shapes = (self.heads[0], queries), *[(self.heads[1], keys)] * 2
        q, k, v = (torch.randn(1, *shape, self.head_dim, generator=random).to(self.dtype) for shape in shapes)
        largest = {"gamma_k": 9.5, "gamma_v": 2.5}
        named = {name: 1 + largest[name] * torch.rand(1, keys, generator=random) for name in self.gates}
        if self.quantised is not None:
            k, v = self.quantised.held(k), self.quantised.held(v)
            named = {
                name: 2 ** gate.log2().floor().clamp(max=2 if name == "gamma_k" else 1) for name, gate in named.items()
            }
        if self.padded:
            named["key_padding_mask"] = (torch.arange(keys) >= keys // 5)[None]
        return (q, k, v), named

    def check(self, device: torch.device) -> Finding:
        """Runs the form on `device`.

        Raises:
            Exception: whatever the call raises; after an error of the device its process is of no more use.
        """
        sequences = self.sequences()
        found = partial(self._found, device)
        if self.gradients:
            return _worst(self._compare_gradients(sequences, found))
        compared = []
        for mine, (tensors, named) in zip(found(sequences), sequences, strict=True):
            exact, eager = (form(*tensors, **named, **self.options) for form in (reference_attention, eager_attention))
            if sinks := self.call.get("sinks"):
                exact, eager = with_sinks(exact, sinks), with_sinks(eager, sinks)
            compared += compare_results(mine, exact, eager, fp32_roundings(*tensors, **named, **self.options))
        return _worst(compared)

    def _found(self, device: torch.device, sequences: list[Sequence]) -> list[Result]:
        there = [
            (tuple(x.to(device) for x in tensors), {name: x.to(device) for name, x in named.items()})
            for tensors, named in sequences
        ]
        return [(out.cpu(), lse.cpu()) for out, lse in self.attend(there, self.options | self.call)]

    def _compare_gradients(
        self, sequences: list[Sequence], found: Callable[[list[Sequence]], list[Result]]
    ) -> list[tuple[str, float, float]]:
        def dense(attend: Callable[..., Result], sequences: list[Sequence]) -> list[Result]:
            return [attend(*tensors, **named, **self.options) for tensors, named in sequences]

        forms = found, partial(dense, eager_attention), partial(dense, reference_attention)
        mine, eager, exact = (_gradients(attend, sequences) for attend in forms)
        # a weight is exp of a logit minus the lse: rounding these to fp32 moves it, and its gradients, by this part
        part = max(fp32_roundings(*tensors, **named, **self.options)[1].max().item() for tensors, named in sequences)
        compared = []
        for (name, x), (_, y), (_, true) in zip(mine, eager, exact, strict=True):
            allowed = allowed_error(true, error(y, true), x.dtype, part * true.abs().max().item())
            compared.append((name, error(x, true) if x.isfinite().all() else float("inf"), allowed))
        return compared


def _worst(compared: list[tuple[str, float, float]]) -> Finding:
    def used(one: tuple[str, float, float]) -> float:
        _, wrong, allowed = one
        return 0.0 if wrong == 0 else wrong / allowed if wrong == wrong and allowed > 0 else float("inf")

    return Finding(*max(compared, key=used))


def _gradients(attend: Callable[[list[Sequence]], list[Result]], sequences: list[Sequence]) -> list[tuple[str, Any]]:
    """Of a sum of all results with fixed weights, in q, k, v and the gates of each sequence, by name."""
    named: list[tuple[str, torch.Tensor]] = []

    def leaf(name: str, x: torch.Tensor) -> torch.Tensor:
        named.append((f"gradient of {name}", x.detach().requires_grad_()))
        return named[-1][1]

    leaves = [
        (
            tuple(leaf(name, x) for name, x in zip("qkv", tensors, strict=True)),
            {n: leaf(n, x) for n, x in gates.items()},
        )
        for tensors, gates in sequences
    ]
    results = [x for result in attend(leaves) for x in result]
    random = torch.Generator().manual_seed(0)
    upstream = [torch.randn(x.shape, generator=random).to(x.dtype) for x in results]
    found = torch.autograd.grad(results, [x for _, x in named], upstream)
    return [(name, x) for (name, _), x in zip(named, found, strict=True)]


def _batch(sequences: list[Sequence]) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    tensors = [torch.cat(xs) for xs in zip(*(tensors for tensors, _ in sequences), strict=True)]
    return tensors, {name: torch.cat([named[name] for _, named in sequences]) for name in sequences[0][1]}


def _rows(out: torch.Tensor, lse: torch.Tensor) -> list[Result]:
    return list(zip(out.split(1), lse.split(1), strict=True))


def attend_dense(sequences: list[Sequence], options: dict[str, Any]) -> list[Result]:
    """As a batch of `anchored_attention`."""
    tensors, named = _batch(sequences)
    return _rows(*anchored_attention(*tensors, **named, **options, return_lse=True))


def attend_halves(sequences: list[Sequence], options: dict[str, Any]) -> list[Result]:
    """`merge_attention` of the first half of the keys and the rest."""
    (q, k, v), named = _batch(sequences)
    half = k.shape[2] // 2
    parts = [
        anchored_attention(
            q, k[:, :, part], v[:, :, part], **{n: x[:, part] for n, x in named.items()}, **options, return_lse=True
        )
        for part in (slice(None, half), slice(half, None))
    ]
    return _rows(*merge_attention(*parts[0], *parts[1]))


def attend_packed(sequences: list[Sequence], options: dict[str, Any]) -> list[Result]:
    """One after the other, by `anchored_attention_varlen`."""
    tensors = [
        torch.cat([x[0].transpose(0, 1) for x in xs]) for xs in zip(*(tensors for tensors, _ in sequences), strict=True)
    ]
    named = {name: torch.cat([named[name][0] for _, named in sequences]) for name in sequences[0][1]}
    queries, keys = ([tensors[i].shape[2] for tensors, _ in sequences] for i in (0, 1))
    cu_q, cu_k = (F.pad(torch.tensor(n), (1, 0)).cumsum(0).to(tensors[0].device, torch.int32) for n in (queries, keys))
    q, k, v = tensors
    out, lse = anchored_attention_varlen(
        q, k, v, cu_q, cu_k, max(queries), max(keys), **named, **options, return_lse=True
    )
    return [(o.transpose(0, 1)[None], s.T[None]) for o, s in zip(out.split(queries), lse.split(queries), strict=True)]


def attend_cache(sequences: list[Sequence], options: dict[str, Any], paged: bool = False) -> list[Result]:
    """By `anchored_attention_decode` over caches with NaN beyond each length; `paged`: on pages in random order."""
    lengths = [tensors[1].shape[2] for tensors, _ in sequences]
    capacity = -(-(max(lengths) + 1) // PAGE_SIZE) * PAGE_SIZE

    def roomy(x: torch.Tensor, value: float) -> torch.Tensor:
        sides = (0, 0, 0, capacity - x.shape[2]) if x.dim() == 4 else (0, capacity - x.shape[1])
        return F.pad(x, sides, value=value)

    (q, k, v), named = _batch(
        [
            ((q, roomy(k, float("nan")), roomy(v, float("nan"))), {name: roomy(x, 1.0) for name, x in named.items()})
            for (q, k, v), named in sequences
        ]
    )
    table = None
    if paged:
        order = torch.randperm(len(lengths) * capacity // PAGE_SIZE, generator=torch.Generator().manual_seed(0))
        k, v = (
            x.unflatten(2, (-1, PAGE_SIZE)).transpose(1, 2).flatten(0, 1)[order.to(x.device)].contiguous()
            for x in (k, v)
        )
        table = order.argsort().view(len(lengths), -1).to(q.device, torch.int32)
    held = torch.tensor(lengths, dtype=torch.int32).to(q.device)
    return _rows(*anchored_attention_decode(q, k, v, held, table, **named, **options, return_lse=True))


attend_pages = partial(attend_cache, paged=True)


def forms(device: torch.device) -> list[Form]:
    """The forms that `device` has kernels for, small where Triton's interpreter runs them, and some of what stands in
    for them; where no kernel can run, every form by torch's SDPA."""
    target = triton_target(device)[0]
    if target is None:
        return list(_forms("sdpa", torch.float32, large=False))
    if target == INTERPRETER:
        return list(_forms("triton", torch.float32, large=False))  # it multiplies bf16 wrongly
    found = list(_forms("triton", torch.bfloat16, large=True, fp8=target in E4M3_TARGETS))
    if target == "sm_90" and gluon_refusal() is None:
        found += _hopper_forms()
    return found + [form for form in _forms("sdpa", torch.bfloat16, large=True) if form.name in FALLBACKS]


FALLBACKS = ("sdpa: prefill, log-bias gate", "sdpa: decode, cache", "sdpa: pages, mixed batch")
SINKS = (-1.0, 0.5, 2.0, 4.0)


def _forms(backend: str, dtype: torch.dtype, large: bool, fp8: bool = True) -> Iterator[Form]:
    prefill, packed = (
        (((200, 300),) * 2, ((200, 300), (150, 170))) if large else (((40, 70),) * 2, ((40, 70), (20, 37)))
    )
    # keys enough for several splits
    cache = ((1, 1100), (1, 300)) if large else ((1, 600), (1, 70))
    several = tuple((5, keys) for _, keys in cache)
    mixed = ((1, 1100), (150, 300), (1, 1), (37, 90)) if large else ((1, 600), (13, 37), (1, 1))
    fixed: dict[str, Any] = {"head_dim": 128 if large else 16, "dtype": dtype}
    call = {"backend": backend}
    log_bias, post_exp = call | {"gate_form": "log-bias"}, call | {"gate_form": "post-exp"}
    capped = {"causal": True, "window": 90 if large else 21, "softcap": 5.0}

    def form(name: str, kernel: str, attend: Attend, lengths: tuple[tuple[int, int], ...], **given: Any) -> Form:
        prefix, at_fault = ("sdpa: ", "sdpa") if backend == "sdpa" else ("", kernel)
        return Form(prefix + name, at_fault, attend, lengths, **fixed | given)

    yield form("prefill, no gate", "prefill", attend_dense, prefill, gates=(), call=call)
    yield form("prefill, log-bias gate", "prefill", attend_dense, prefill, call=log_bias)
    yield form("prefill, post-exp gate", "prefill", attend_dense, prefill, call=post_exp)
    yield form("prefill, padded", "prefill", attend_dense, prefill, padded=True, call=log_bias)
    yield form("prefill, window and softcap", "prefill", attend_dense, prefill, options=capped, call=post_exp)
    yield form("prefill, fp16", "prefill", attend_dense, prefill, dtype=torch.float16, call=log_bias)
    yield form("decode", "decode", attend_dense, cache[:1] * 2, padded=True, call=call)
    yield form("decode, several queries", "decode", attend_dense, several[:1] * 2, call=call)
    yield form("decode, cache", "decode", attend_cache, several, call=call)
    yield form("decode, pages", "decode", attend_pages, cache, call=call)
    for name, gate in (("mixed batch", "written"), ("gates apart", "apart")):
        yield form(f"pages, {name}", "paged", partial(attend_paged, form=gate), mixed, call=call)
    with_sink = {"options": capped, "call": call | {"sinks": SINKS}}
    yield form("pages, sinks, window and softcap", "paged", attend_paged, mixed, gates=(), **with_sink)
    for dtype_held, per_token in ((torch.int8, True), (torch.float8_e4m3fn, False)) if fp8 else ((torch.int8, True),):
        held = Quantised(dtype_held, per_token)
        attend = partial(attend_paged, form="written", quantised=held)
        yield form(f"pages, {str(dtype_held)[6:]}", "paged", attend, mixed, quantised=held, call=call)
    short = ((30, 1100),) if large else ((9, 200),)
    yield form("pages, short prefill", "paged", partial(attend_paged, form="written"), short, call=call)
    yield form("short prefill", "paged", attend_dense, short, call=log_bias)
    yield form("packed", "packed", attend_packed, packed, call=post_exp)
    yield form("merge of two parts", "merge", attend_halves, prefill, options={"causal": False}, call=post_exp)
    yield form("backward", "backward", attend_dense, prefill, gradients=True, call=post_exp)
    yield form("backward, packed", "backward", attend_packed, packed, gradients=True, call=log_bias)
    if dtype != torch.float32:
        fp32 = {"dtype": torch.float32, "call": post_exp}
        yield form("prefill, fp32", "prefill", attend_dense, prefill, **fp32)
        yield form("decode, fp32", "decode", attend_dense, cache[:1] * 2, dtype=torch.float32, call=call)
        yield form("backward, fp32", "backward", attend_dense, prefill, gradients=True, **fp32)


def _hopper_forms() -> list[Form]:
    lengths = ((200, 300),) * 2
    return [
        Form(f"hopper, {name}", "hopper", attend_dense, lengths, 128, gates=gates, call=call | {"backend": "hopper"})
        for name, gates, call in (
            ("no gate", (), {}),
            ("log-bias gate", ("gamma_k", "gamma_v"), {"gate_form": "log-bias"}),
            ("post-exp gate", ("gamma_k", "gamma_v"), {"gate_form": "post-exp"}),
        )
    ]
