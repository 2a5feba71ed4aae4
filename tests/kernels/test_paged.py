"""Attention over pages by its launcher: random mixed batches against fp64, sequence by sequence and head by head."""

import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from videoanchor_triton.kernels.gate_pages import GatePages
from videoanchor_triton.kernels.operands import Masks, Parts, PositionGate
from videoanchor_triton.kernels.paged import merge_arguments, paged, paged_arguments
from videoanchor_triton.kernels.plan_kernel import Plan
from videoanchor_triton.kernels.tiles import INTERPRETER, Tile

CASES = int(os.environ.get("VIDEOANCHOR_PAGED_CASES", "60"))
NAN, INF = float("nan"), float("inf")
EPS = 2 * torch.finfo(torch.float32).eps
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


@dataclass
class Batch:
    """Arguments of `paged`, and what the cache means in fp64: by slot (P, Hkv, page), gates by planned head."""

    call: dict[str, Any]
    masks: Masks
    keys: torch.Tensor
    values: torch.Tensor
    log_gate: torch.Tensor
    gain: torch.Tensor
    starts: list[int]
    lengths: list[int]
    name: str


def drawn(seed: int) -> Batch:
    """A mixed batch: NaN in every slot and gate that no sequence uses, and wherever results go."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    dtype = r.choice([torch.float32, torch.float16, torch.bfloat16])
    stored = r.choice([None, None, None, torch.float8_e4m3fn, torch.int8])
    page, head_dim = r.choice([1, 8, 16, 48, 64, 256]), r.choice([16, 32, 64, 72, 80, 96, 112, 128, 256])
    group, kv_heads, sequences = r.choice([1, 2, 3, 4, 7, 8, 12, 16]), r.choice([1, 1, 2]), r.randint(1, 5)
    lengths = [r.choice([0, 1, r.randint(1, 40), r.randint(1, 300)]) for _ in range(sequences)]
    if r.random() < 0.2:
        lengths[-1] = r.randint(400, 700)
    queries = [r.choice([0, 1, 1, r.randint(1, 20)]) for _ in lengths]
    if r.random() < 0.8:  # an engine has keys for all its queries; the rest are rows without a key
        queries = [min(pair) for pair in zip(queries, lengths, strict=True)]
    offsets = torch.tensor([0, *queries]).cumsum(0).int()
    total = int(offsets[-1]) + r.choice([0, 0, 5]) or 3
    width = max(1, -(-max(lengths) // page)) + r.randint(0, 2)
    pages = sequences * width + 3
    table = torch.randperm(pages)[: sequences * width].view(sequences, width).int()
    if sequences > 1 and r.random() < 0.5:  # a shared prefix
        table[1, : width // 2] = table[0, : width // 2]
    used = torch.zeros(pages, page, dtype=torch.bool)
    for b, length in enumerate(lengths):
        for j in range(length):
            used[table[b, j // page], j % page] = True

    form = r.choice(["none", "written", "written", "apart", "apart", "position", "query heads"])
    shape = (pages, kv_heads, page)
    k, v = torch.randn(*shape, head_dim) * r.choice([1.0, 4.0]), torch.randn(*shape, head_dim)
    log_gate, gain = torch.rand(shape) * 4 - 1.4, torch.rand(shape) * 3 + 0.1
    extreme = r.random() < 0.3 and form != "written"
    if extreme:
        odd = torch.tensor([0.0, 1e-30, 1e30, 1.0])[torch.randint(4, shape)].log()
        log_gate = torch.where(torch.rand(shape) < 0.3, odd, log_gate)
        # what the results can hold
        large = 100.0 if dtype == torch.float16 or stored else 1e30
        odd = torch.tensor([0.0, 1e-3, large])[torch.randint(3, shape)]
        gain = torch.where(torch.rand(shape) < 0.3, odd, gain)
    if form == "none":
        log_gate, gain = torch.zeros(shape), torch.ones(shape)
    held = v * (log_gate.exp() * gain)[..., None] if form == "written" else v
    per_token = r.random() < 0.5
    k_scale = v_scale = None
    if stored is not None:
        # per token, or one for all
        sizes = [x.abs().amax(-1).clamp(min=1e-6) / LARGEST[stored] for x in (k, held)]
        k_scale, v_scale = sizes if per_token else (x.amax().view(1) for x in sizes)
        k, held = (x / (s[..., None] if per_token else s) for x, s in ((k, k_scale), (held, v_scale)))
        if stored == torch.int8:
            k, held = k.round(), held.round()
    both = torch.full((*shape, 2 * head_dim), NAN if stored != torch.int8 else 77).to(stored or dtype)
    k_pages, v_pages = both.split(head_dim, -1)  # halves of one tensor
    slots = used[:, None].expand(shape)
    k_pages[slots], v_pages[slots] = k.to(both.dtype)[slots], held.to(both.dtype)[slots]
    keys, values = (torch.where(slots[..., None], x.float(), 0.0).double() for x in (k_pages, v_pages))
    if k_scale is not None and v_scale is not None:
        scales = (k_scale, v_scale) if not per_token else (k_scale[..., None], v_scale[..., None])
        keys, values = keys * scales[0].double(), values * scales[1].double()
    gate: GatePages | PositionGate | None = None
    if form == "written":
        gate = GatePages(log_gate.exp().masked_fill(~slots, NAN), form)
        log_gate = log_gate.exp().log()
        values = values / (gate.values.double().nan_to_num(1) * gain.double())[..., None]
    elif form == "apart":
        factor = gain * v_scale if v_scale is not None and per_token else gain
        gate = GatePages(torch.stack([log_gate / math.log(2), factor], -1).masked_fill(~slots[..., None], NAN), form)
    elif form in ("position", "query heads"):
        heads = kv_heads if form == "position" else kv_heads * group
        short = width * page - r.randint(0, width * page // 2)
        of_heads = torch.arange(heads) * kv_heads // heads
        log_gate, gain = (x[table.long()].transpose(1, 2).flatten(2)[:, of_heads] for x in (log_gate, gain))
        if heads > kv_heads:
            log_gate, gain = log_gate + torch.rand(1, heads, 1), gain * (1 + torch.rand(1, heads, 1))
        log_gate[..., short:], gain[..., short:] = 0, 1
        roomy = torch.full((sequences, heads, short + 3), NAN)  # slices of a larger buffer
        roomy[..., :short] = log_gate[..., :short]
        gate = PositionGate(roomy[..., :short], gain[..., :short])
    if per_token and k_scale is not None and v_scale is not None:
        k_scale, v_scale = (x.masked_fill(~slots, NAN) for x in (k_scale, v_scale))

    causal = r.random() < 0.85
    window = r.choice([None, None, 37]) if causal else None
    masks = Masks(head_dim**-0.5, causal, window, r.choice([None, None, 20.0]))
    tile = Tile(r.choice([16, 16, 32, 64]), r.choice([16, 32, 64, 128]), 4, 1)
    call = {
        "q": torch.randn(total, group * kv_heads, head_dim).to(dtype),
        "k": k_pages,
        "v": v_pages,
        "cu_seqlens_q": offsets,
        "seqlens_k": torch.tensor(lengths, dtype=torch.int32),
        "block_table": table,
        "max_seqlen_q": max(queries),
        "gate": gate,
        "k_scale": k_scale,
        "v_scale": v_scale,
        "sinks": torch.randn(group * kv_heads) * 2 if r.random() < 0.3 else None,
        "tile": tile,
        "programs": r.choice([1, 3, 8, 17]),
    }
    name = f"{seed}: {dtype}, {stored}, {'per token' if per_token else 'per tensor'}, {form}, page {page}, D {head_dim}"
    return Batch(call, masks, keys, values, log_gate.double(), gain.double(), offsets.tolist(), lengths, name)


def attend_exactly(
    batch: Batch, rounded: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """out (Tq, Hq, D), lse (Tq, Hq), and what fp32 rounds within both; `rounded` acts where an eager form rounds."""
    q, table, gate, sinks = (batch.call[name] for name in ("q", "block_table", "gate", "sinks"))
    total, heads, head_dim = q.shape
    kv_heads, page = batch.keys.shape[1:3]
    masks = batch.masks
    out = torch.zeros(total, heads, head_dim, dtype=torch.float64)
    lse = torch.full((total, heads), -INF, dtype=torch.float64)
    if sinks is not None:  # rows of padding, behind the last sequence, have none
        lse[: batch.starts[-1]] = sinks.double()
    inside, inside_lse = torch.zeros(total, heads, 1, dtype=torch.float64), torch.zeros_like(lse)
    for b, length in enumerate(batch.lengths):
        rows = slice(batch.starts[b], batch.starts[b + 1])
        count = rows.stop - rows.start
        slot = [(int(table[b, j // page]), j % page) for j in range(length)]
        at, of = (torch.tensor([x[i] for x in slot], dtype=torch.long) for i in (0, 1))
        for h in range(heads):
            kv = h * kv_heads // heads
            k, v = batch.keys[at, kv, of], batch.values[at, kv, of]
            if isinstance(gate, PositionGate):
                own = h * batch.log_gate.shape[1] // heads
                bias, gain = batch.log_gate[b, own, :length], batch.gain[b, own, :length]
            else:
                bias, gain = batch.log_gate[at, kv, of], batch.gain[at, kv, of]
            of_q = q[rows, h].double()
            s = of_q @ k.T * masks.scale
            s = s if masks.softcap is None else masks.softcap * (s / masks.softcap).tanh()
            position = torch.arange(count)[:, None] + length - count
            visible = torch.ones(count, length, dtype=torch.bool)
            if masks.causal:
                visible &= torch.arange(length) <= position
            if masks.window is not None:
                visible &= torch.arange(length) > position - masks.window
            s = (s + bias).masked_fill(~visible, -INF)
            if sinks is not None:
                s = torch.cat([s, sinks[h].double().expand(count, 1)], 1)
                v, gain = torch.cat([v, v.new_zeros(1, head_dim)]), torch.cat([gain, gain.new_ones(1)])
            sums = s.logsumexp(-1) if s.shape[1] else torch.full((count,), -INF, dtype=torch.float64)
            weights = (s - sums.masked_fill(sums == -INF, 0)[:, None]).exp()
            lse[rows, h] = sums
            out[rows, h] = rounded(rounded(weights) @ rounded(gain[:, None] * v)) if s.shape[1] else 0
            if s.shape[1]:
                terms = of_q.abs() @ k.abs().T * masks.scale + bias.abs().nan_to_num(posinf=0)
                size = terms.masked_fill(~visible, 0).amax(-1) if length else torch.zeros(count)
                size = size + (masks.softcap or 0)
                inside[rows, h, 0] = EPS * (1 + size) * (weights @ (gain[:, None] * v).abs()).amax(-1)
                inside_lse[rows, h] = EPS * (size + sums.abs().nan_to_num(posinf=0))
    return out, lse, inside, inside_lse


def run(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of the launcher, from memory full of NaN."""
    call = dict(batch.call)
    q, k, v = (call.pop(name) for name in "qkv")
    out = torch.full_like(q, NAN)
    lse = torch.full(q.shape[1::-1], NAN).T
    paged(q, k, v, out, lse, batch.masks, INTERPRETER, **call)
    return out, lse


def largest(x: torch.Tensor) -> torch.Tensor:
    return x.abs().amax(-1, keepdim=True)


@pytest.mark.parametrize("seed", range(CASES))
def test_a_mixed_batch_is_as_exact_as_an_eager_form(seed: int) -> None:
    batch = drawn(seed)
    out, lse = run(batch)
    true, true_lse, inside, inside_lse = attend_exactly(batch, lambda x: x)
    dtype = batch.call["q"].dtype
    eager, *_ = attend_exactly(batch, lambda x: x.to(dtype).double())
    assert not out.isnan().any(), batch.name
    assert torch.equal(lse == -INF, true_lse == -INF), batch.name
    allowed = 2 * largest(eager - true).amax() + torch.finfo(dtype).eps / 2 * largest(true) + inside + 1e-30
    error = (out.double() - true).abs()
    assert (error <= allowed).all(), f"{batch.name}: {(error / allowed).amax():.2f} of the error allowed"
    seen = true_lse != -INF
    error = (lse.double() - true_lse).abs()[seen]
    assert (error <= inside_lse[seen] + EPS).all(), f"{batch.name}: lse is {error.amax():.2g} off"


def specialised(x: object) -> object:
    """What of an argument chooses the compiled kernel: Triton looks at 1 and at multiples of 16."""
    if isinstance(x, tuple):
        return [specialised(each) for each in x]
    if isinstance(x, torch.Tensor):
        return x.dtype
    return (x == 1, x % 16 == 0) if type(x) is int else x


def test_no_length_compiles_the_kernels_again() -> None:
    """Sequences, pages, widths of tables, queries, keys of a dense cache, and padding masks of every size."""
    tile, plan = Tile(16, 64, 4, 2), Plan(*(torch.empty(8).int(),) * 3)
    parts, masks = Parts(torch.empty(2, 16, 128), torch.empty(2, 16)), Masks(0.1, True, None, None)
    found = []
    for size in (1, 3, 5, 16, 48):
        q, pages = torch.empty(size, 4, 128), torch.empty(size, 2, 16, 128)
        lengths, table = torch.empty(size).int(), torch.empty(size, size).int()
        options = {"plan": plan, "parts": parts, "tile": tile, "sequences": size}
        gate = PositionGate(*torch.empty(2, size, 2, size))
        lse = torch.empty(4, size).T
        given = paged_arguments(
            q, pages, pages, q, lse, masks, seqlens_k=lengths, block_table=table, gate=gate, **options
        )
        q, k = torch.empty(size, 4, size, 128), torch.empty(size, 2, size, 128)
        seen = torch.empty(size, size).bool()
        dense = paged_arguments(q, k, k, q, q[..., 0].float(), masks, seqlens_k=None, gate=gate, seen=seen, **options)
        found.append(
            [
                {name: specialised(x) for name, x in each.items()}
                for each in (given, merge_arguments(given), dense, merge_arguments(dense))
            ]
        )
    assert all(each == found[0] for each in found)
