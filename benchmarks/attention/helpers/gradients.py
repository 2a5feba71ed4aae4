"""Forward and backward pass of causal prefill: ours with gradients of the gates, SDPA ungated and with a dense mask.

Work counted: the forward's two products and the backward's five, over visible pairs. The gradients are checked where
the upstream gradient is 0 except in sampled query rows: fp64 then needs those rows only, and every row of dk and dv is
still compared.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import videoanchor_triton as va
from benchmarks.attention.helpers.checks import gradient_finding
from benchmarks.attention.helpers.contenders import HEADS, dense_mask
from benchmarks.attention.helpers.settled import entry, key_of
from benchmarks.helpers.measure import Inputs, Shape, Task, full_size, judged, skip_for_memory, timed, with_peak
from benchmarks.helpers.record import Row
from videoanchor_triton.kernels.reference import reference_attention
from videoanchor_triton.kernels.tolerance import eager_attention

BACKWARD_WORK = 3.5


@dataclass(frozen=True)
class Trainer:
    """A forward pass that is differentiated in q, k, v and, if `gates`, in gamma_k and gamma_v.

    `make` prepares what is done once per forward pass of a model and returns the pass as a function of the leaves.
    `quadratic` says that it holds tensors of Nq x Nk elements, `tiles` stand in BACKWARD of kernels/measured.py
    meanwhile.
    """

    name: str
    gated: bool
    make: Callable[[Inputs], Callable[..., torch.Tensor]]
    gates: bool = False
    quadratic: bool = False
    tiles: Any = None


def backward_tasks(device: torch.device) -> Iterator[Task]:
    """One task for each contender and length."""
    heads, head_dim, lengths = ((4, 2), 16, (40,)) if not full_size(device) else (HEADS[0], 128, (2048, 8192, 32768))
    for length in lengths:
        shape = Shape(1, *heads, head_dim, length, length, True)
        for trainer in TRAINERS:
            kernel = "backward" if trainer.name.startswith("ours") else trainer.name
            yield Task(shape.row("backward", trainer.name), kernel, training(shape, trainer, device))


def training(shape: Shape, trainer: Trainer, device: torch.device) -> Callable[[Row], Row]:
    def measure(row: Row) -> Row:
        # the mask, two bool tensors while it is built, and a copy in the backward pass
        needed = 6.0 * shape.queries * shape.keys if trainer.quadratic else 0.0
        if skipped := skip_for_memory(row, needed, device):
            return skipped
        inputs = Inputs(shape, device)
        leaves = [
            x.requires_grad_() for x in (*inputs.tensors, inputs.gamma_k, inputs.gamma_v)[: 5 if trainer.gates else 3]
        ]
        forward = trainer.make(inputs)

        def run(upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
            key = key_of(device, shape.head_dim)
            with nullcontext() if trainer.tiles is None else entry("BACKWARD", key, trainer.tiles):
                return torch.autograd.grad(forward(*leaves), leaves, upstream)

        upstream = torch.randn_like(inputs.q)
        sparse = torch.zeros_like(upstream)
        for b, i in _samples(inputs):
            sparse[b, :, i] = upstream[b, :, i]
        found, peak = with_peak(lambda: run(sparse), device)
        dq = torch.stack([found[0][b, :, i] for b, i in _samples(inputs)])
        eager, exact = (
            _row_gradients(attend, inputs, sparse, trainer.gated)[: len(leaves)]
            for attend in (eager_attention, reference_attention)
        )
        row = judged(replace(row, peak_extra_mib=peak), *gradient_finding([dq, *found[1:]], eager, exact))
        return timed(row, lambda: run(upstream), BACKWARD_WORK * shape.flop, "TFLOP/s", device)

    return measure


def _samples(inputs: Inputs) -> list[tuple[int, int]]:
    # the first row sees one key: its dS is 0, and what a kernel finds instead is rounding alone
    return [(b, i) for b, i in inputs.samples if i > 0]


def _row_gradients(
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor]], inputs: Inputs, upstream: torch.Tensor, gated: bool
) -> list[torch.Tensor]:
    """dq (samples, Hq, D), dk, dv (B, Hkv, Nk, D), dgamma_k, dgamma_v (B, Nk) in fp64 of the sampled rows."""
    leading = torch.zeros(len(_samples(inputs)), *inputs.q.shape[1::2], dtype=torch.float64, device=inputs.q.device)
    sums = [leading, *(torch.zeros_like(x, dtype=torch.float64) for x in (inputs.k, inputs.v))]
    sums += [torch.zeros_like(x, dtype=torch.float64) for x in (inputs.gamma_k, inputs.gamma_v) if gated]
    for sample, (b, i) in enumerate(_samples(inputs)):
        tensors, gates = inputs.rows_as_group(b, i)
        leaves = [x.detach().requires_grad_() for x in (*tensors, *(gates.values() if gated else ()))]
        out = attend(*leaves[:3], **dict(zip(gates, leaves[3:], strict=False)))[0]
        found = torch.autograd.grad(out, leaves, upstream[b, :, i].reshape(out.shape).to(out.dtype))
        sums[0][sample] = found[0].reshape(sums[0].shape[1:])
        for total, part in zip(sums[1:], found[1:], strict=True):
            keys = 1 if part.dim() == 2 else 2
            total[b : b + 1].narrow(keys, 0, part.shape[keys]).add_(part)
    return sums


def _ours(gate_form: str | None) -> Callable[[Inputs], Callable[..., torch.Tensor]]:
    def make(inputs: Inputs) -> Callable[..., torch.Tensor]:
        def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *gates: torch.Tensor) -> torch.Tensor:
            given: dict[str, Any] = dict(zip(("gamma_k", "gamma_v"), gates, strict=False))
            given |= {} if gate_form is None else {"gate_form": gate_form}
            return va.anchored_attention(q, k, v, causal=inputs.shape.causal, backend="triton", **given)

        return forward

    return make


def _flash(inputs: Inputs) -> Callable[..., torch.Tensor]:
    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=inputs.shape.causal, enable_gqa=True)

    return forward


def _dense(inputs: Inputs) -> Callable[..., torch.Tensor]:
    """A fixed gate in a dense mask built once; K and V are repeated, and V weighted, in each run."""
    mask, weight = dense_mask(inputs), inputs.gamma_v[:, None, :, None]

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (x.repeat_interleave(inputs.shape.group, 1) for x in (k, (v * weight).to(v.dtype)))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return forward


TRAINERS = (
    Trainer("ours, gated, post-exp", True, _ours("post-exp"), gates=True),
    Trainer("ours, gated, log-bias", True, _ours("log-bias"), gates=True),
    Trainer("ours, ungated", False, _ours(None)),
    Trainer("SDPA flash, ungated", False, _flash),
    Trainer("SDPA dense mask", True, _dense, quadratic=True),
)
