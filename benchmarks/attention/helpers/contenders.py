"""What is timed side by side: our kernels, and the forms in which torch can compute the same attention.

Work that a user pays in every layer is inside the clock: weighting V by the gate, repeating K and V for kernels without
grouped heads, building q' and k'. Work done once per forward pass is not: the gate's logarithm, a bias or mask built
from it, a block mask, compilation. In decode the cache of the augmented form is kept as k' and weighted V.

FlexAttention is compiled for each shape, which costs seconds: it has a row for 28 query heads over 4 KV heads only, in
decode only for batches of up to 8, and ungated only for prefill of 8k and 32k at head dim 128.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import videoanchor_triton as va
from benchmarks.attention.helpers.checks import hopper_absence
from benchmarks.attention.helpers.settled import entry, key_of
from benchmarks.helpers.measure import Inputs, Shape, Task, full_size, skip_for_memory, timed, with_peak
from benchmarks.helpers.record import SKIPPED, Row

Run = Callable[[], torch.Tensor]
HEADS = ((28, 4), (32, 8))
PAGE_SIZE = 64
FLEX_BLOCK = 128
COLUMNS = 3


@dataclass(frozen=True)
class Contender:
    """A way to compute the attention of some inputs; `make` prepares what is done once per forward pass.

    `extra_bytes` is about what the contender holds beyond the inputs where that is more than O(N), and `absence` says
    why there is no row for a shape.
    """

    name: str
    gated: bool
    make: Callable[[Inputs], Run]
    extra_bytes: Callable[[Shape], float] = lambda _: 0.0
    absence: Callable[[Shape, torch.device], str] = lambda _shape, _device: ""


def attention_tasks(section: str, device: torch.device) -> Iterator[Task]:
    """One task for each contender and shape of "prefill" or "decode"."""
    contenders = CONTENDERS[section]
    for rank, shape in shapes(section, device):
        for contender in contenders:
            yield Task(
                shape.row(section, contender.name), _kernel(contender), measurement(shape, contender, device), rank
            )


def _kernel(contender: Contender) -> str:
    return "hopper" if "hopper" in contender.name else contender.name


def shapes(section: str, device: torch.device) -> Iterator[tuple[int, Shape]]:
    """(rank, shape) by importance: head dim 128 and 28 heads first, 128k keys of the other shapes last."""
    if not full_size(device):
        if section == "prefill":
            yield 0, Shape(1, 4, 2, 16, 40, 40, True)
            yield 0, Shape(1, 4, 2, 16, 40, 40, False)
        else:
            yield 0, Shape(2, 4, 2, 16, 1, 150, True)
        return
    if section == "prefill":
        for heads, head_dim, keys, causal in product(HEADS, (128, 64), (2048, 8192, 32768, 131072), (True, False)):
            first = heads == HEADS[0] and head_dim == 128
            yield 0 if first else 2 if keys > 32768 else 1, Shape(1, *heads, head_dim, keys, keys, causal)
    else:
        for heads, batch, keys in product(HEADS, (1, 8, 64), (8192, 32768, 131072)):
            yield 0 if heads == HEADS[0] else 1, Shape(batch, *heads, 128, 1, keys, True)


_held: dict[Shape, Inputs] = {}  # those of the shape that is being timed


def measurement(shape: Shape, contender: Contender, device: torch.device) -> Callable[[Row], Row]:
    """Check sampled query rows against fp64, then time."""

    def measure(row: Row) -> Row:
        if reason := contender.absence(shape, device):
            return replace(row, status=SKIPPED, reason=reason)
        if shape not in _held:
            _held.clear()
            if skipped := skip_for_memory(row, shape.cache_bytes, device):
                return skipped
            _held[shape] = Inputs(shape, device)
        inputs = _held[shape]
        if skipped := skip_for_memory(row, contender.extra_bytes(shape), device):
            return skipped
        run = contender.make(inputs)
        out, peak = with_peak(run, device)
        row = inputs.judge(replace(row, peak_extra_mib=peak), out, contender.gated)
        if shape.queries > 1:
            return timed(row, run, shape.flop, "TFLOP/s", device)
        gates = 2 * inputs.gamma_k.nbytes if contender.gated else 0
        return timed(row, run, float(shape.cache_bytes + gates), "TB/s", device)

    return measure


def ours(backend: str, gate_form: str | None) -> Callable[[Inputs], Run]:
    """`anchored_attention`; everything it does is inside the clock. gate_form None is ungated.

    The form is the one asked for, whatever kernels/measured.py prefers.
    """

    def make(inputs: Inputs) -> Run:
        options: dict[str, Any] = {"causal": inputs.shape.causal, "backend": backend}
        if gate_form is not None:
            options |= {"gamma_k": inputs.gamma_k, "gamma_v": inputs.gamma_v, "gate_form": gate_form}
        key = key_of(inputs.q.device, inputs.shape.head_dim)

        def run() -> torch.Tensor:
            with entry("LOG_BIAS", key, False):
                return va.anchored_attention(*inputs.tensors, **options)

        return run

    return make


def ours_decode(gated: bool, paged: bool) -> Callable[[Inputs], Run]:
    """`anchored_attention_decode` with lengths on the device, over pages in random order where `paged`."""

    def make(inputs: Inputs) -> Run:
        q, k, v = inputs.tensors
        shape, table = inputs.shape, None
        lengths = torch.full((shape.batch,), shape.keys, dtype=torch.int32, device=q.device)
        if paged:
            pages = -(-shape.keys // PAGE_SIZE)
            table = torch.randperm(shape.batch * pages, device=q.device).int().view(shape.batch, pages)
            k, v = _in_pages(k, table), _in_pages(v, table)
        gates: dict[str, Any] = {"gamma_k": inputs.gamma_k, "gamma_v": inputs.gamma_v} if gated else {}
        return lambda: va.anchored_attention_decode(q, k, v, lengths, table, **gates, backend="triton")

    return make


def _in_pages(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """(B, Hkv, N, D) as pages (n, Hkv, PAGE_SIZE, D) where `table` (B, pages) says."""
    batch, heads, keys, head_dim = x.shape
    cache = x.new_zeros((table.numel(), heads, PAGE_SIZE, head_dim))
    for b in range(batch):
        padded = F.pad(x[b], (0, 0, 0, -keys % PAGE_SIZE))
        cache[table[b].long()] = padded.view(heads, -1, PAGE_SIZE, head_dim).transpose(0, 1)
    return cache


def _square(shape: Shape) -> bool:
    # one query sees every key: no mask is needed
    return shape.causal and shape.queries > 1


def _sdpa_ungated(backend: SDPBackend) -> Callable[[Inputs], Run]:
    """torch's fastest kernels, which know no gate: the speed that a gate should not cost."""

    def make(inputs: Inputs) -> Run:
        def run() -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*inputs.tensors, is_causal=_square(inputs.shape), enable_gqa=True)

        return run

    return make


def _gated_values(inputs: Inputs) -> torch.Tensor:
    return (inputs.v * inputs.gamma_v[:, None, :, None]).to(inputs.v.dtype)


def _repeated(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """K and weighted V with a head for each query head, for kernels without grouped heads."""
    group = inputs.shape.group
    return inputs.k.repeat_interleave(group, 1), _gated_values(inputs).repeat_interleave(group, 1)


def _efficient_bias(inputs: Inputs) -> Run:
    """The memory-efficient kernel with log gamma_K expanded over heads and rows with stride 0, causal inside it.

    The bias is built once; V is weighted, and K and V repeated, in each run.
    """
    shape = inputs.shape
    padded = F.pad(inputs.gamma_k.log().to(inputs.q.dtype), (0, -shape.keys % 8))
    bias = padded[:, None, None, : shape.keys].expand(-1, shape.query_heads, shape.queries, -1)

    def run() -> torch.Tensor:
        k, v = _repeated(inputs)
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            inputs.q, k, v, bias, compute_log_sumexp=False, is_causal=_square(shape)
        )[0]

    return run


def dense_mask(inputs: Inputs) -> torch.Tensor:
    """The gate and the causal mask as one (B, 1, Nq, Nk) tensor."""
    shape = inputs.shape
    mask = inputs.gamma_k.log().to(inputs.q.dtype)[:, None, None].repeat(1, 1, shape.queries, 1)
    if _square(shape):
        hidden = torch.ones(shape.queries, shape.keys, dtype=torch.bool, device=mask.device).triu_(1)
        mask.masked_fill_(hidden, float("-inf"))
    return mask


def _dense_mask(inputs: Inputs) -> Run:
    """SDPA with a dense mask that is built once; V is weighted, and K and V repeated, in each run."""
    mask = dense_mask(inputs)

    def run() -> torch.Tensor:
        k, v = _repeated(inputs)
        return F.scaled_dot_product_attention(inputs.q, k, v, attn_mask=mask)

    return run


def _augmented(inputs: Inputs) -> Run:
    """SDPA on q' = [q, 1], k' = [k, log gamma_K / scale]: any fused kernel, at a wider head dim.

    bf16 rounds the logarithm, so it is split in COLUMNS parts; the head dim is padded to a multiple of 8.
    """
    shape = inputs.shape
    scale = shape.head_dim**-0.5
    rest = (inputs.gamma_k.log() / scale)[:, None].expand(-1, shape.kv_heads, -1)
    parts: list[torch.Tensor] = []
    for _ in range(COLUMNS):
        parts.append(rest.to(inputs.k.dtype))
        rest = rest - parts[-1]
    columns = torch.stack(parts, -1)
    width = -(-(shape.head_dim + COLUMNS) // 8) * 8 - shape.head_dim

    def keys_and_values() -> tuple[torch.Tensor, torch.Tensor]:
        k = F.pad(torch.cat([inputs.k, columns], -1), (0, width - COLUMNS))
        return k, F.pad(_gated_values(inputs), (0, width))

    cached = keys_and_values() if shape.queries == 1 else None

    def run() -> torch.Tensor:
        k, v = keys_and_values() if cached is None else cached
        q = F.pad(F.pad(inputs.q, (0, COLUMNS), value=1.0), (0, width - COLUMNS))
        out = F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=_square(shape), enable_gqa=True)
        return out[..., : shape.head_dim]

    return run


def causal_blocks(length: int, device: torch.device) -> BlockMask:
    """The causal block mask without the N x N tensor that `create_block_mask` goes through."""
    blocks = -(-length // FLEX_BLOCK)
    order = torch.arange(blocks, dtype=torch.int32, device=device)
    every = order.expand(1, 1, blocks, blocks)
    diagonal = ((order[None] + order[:, None]) % blocks).expand(1, 1, blocks, blocks)
    return BlockMask.from_kv_blocks(
        torch.ones(1, 1, blocks, dtype=torch.int32, device=device),
        diagonal.contiguous(),
        order.expand(1, 1, blocks).contiguous(),
        every.contiguous(),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=lambda _b, _h, i, j: i >= j,
        seq_lengths=(length, length),
    )


def _flex(gated: bool) -> Callable[[Inputs], Run]:
    """FlexAttention, compiled, with log gamma_K as a change of the score. V is weighted in each run."""

    def make(inputs: Inputs) -> Run:
        bias = inputs.gamma_k.log()
        blocks = causal_blocks(inputs.shape.keys, inputs.q.device) if _square(inputs.shape) else None
        score_mod = (lambda s, b, _h, _i, j: s + bias[b, j]) if gated else None
        # each shape is compiled anew; beyond a limit of recompilations dynamo would run the dense form
        torch._dynamo.reset()
        attend: Any = flex_attention
        if inputs.q.is_cuda:
            attend = torch.compile(flex_attention, dynamic=False)

        def run() -> torch.Tensor:
            v = _gated_values(inputs) if gated else inputs.v
            return attend(inputs.q, inputs.k, v, score_mod, block_mask=blocks, enable_gqa=True)

        return run

    return make


def _flex_absence(gated: bool) -> Callable[[Shape, torch.device], str]:
    def absence(shape: Shape, device: torch.device) -> str:
        if not full_size(device):
            return ""
        if (shape.query_heads, shape.kv_heads) != HEADS[0] or shape.batch > 8:
            return "FlexAttention is compiled for each shape: 28 query heads and batches of up to 8 only"
        if not gated and (shape.head_dim != 128 or shape.keys not in (8192, 32768)):
            return "FlexAttention is compiled for each shape: ungated at D=128, N=8k and 32k only"
        return ""

    return absence


def _hopper_absence(_shape: Shape, device: torch.device) -> str:
    return hopper_absence(device)


def _no_cpu(_shape: Shape, device: torch.device) -> str:
    return "" if device.type == "cuda" else "the kernel needs a GPU"


def _repeated_bytes(shape: Shape) -> float:
    return shape.cache_bytes * (shape.group + 1)


def _mask_bytes(shape: Shape) -> float:
    # the mask in bf16, and two bool tensors while it is built
    return _repeated_bytes(shape) + 4.0 * shape.batch * shape.queries * shape.keys


def _once(shape: Shape) -> float:
    return shape.cache_bytes


def _twice(shape: Shape) -> float:
    return 2 * shape.cache_bytes


SDPA = [
    Contender("SDPA flash, ungated", False, _sdpa_ungated(SDPBackend.FLASH_ATTENTION)),
    Contender("SDPA cuDNN, ungated", False, _sdpa_ungated(SDPBackend.CUDNN_ATTENTION), absence=_no_cpu),
    Contender("SDPA efficient, expanded bias", True, _efficient_bias, _repeated_bytes, _no_cpu),
    Contender("SDPA dense mask", True, _dense_mask, _mask_bytes),
    Contender("SDPA augmented head", True, _augmented, _twice),
    Contender("FlexAttention, gated", True, _flex(True), absence=_flex_absence(True)),
]
CONTENDERS = {
    "prefill": [
        Contender("ours, gated, post-exp", True, ours("triton", "post-exp")),
        Contender("ours, gated, log-bias", True, ours("triton", "log-bias")),
        Contender("ours, ungated", False, ours("triton", None)),
        Contender("ours, hopper, gated", True, ours("hopper", "post-exp"), absence=_hopper_absence),
        Contender("ours, hopper, ungated", False, ours("hopper", None), absence=_hopper_absence),
        *SDPA,
        Contender("FlexAttention, ungated", False, _flex(False), absence=_flex_absence(False)),
    ],
    "decode": [
        Contender("ours, gated, contiguous", True, ours_decode(True, False)),
        Contender("ours, gated, pages of 64", True, ours_decode(True, True), _once),
        Contender("ours, contiguous, ungated", False, ours_decode(False, False)),
        *SDPA,
    ],
}
