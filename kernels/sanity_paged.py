"""The sanity checks' calls over pages: what is written into a paged cache, and read from it in one mixed batch."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from .api_paged import anchored_attention_paged, write_pages
from .gate_pages import GatePages, gate_pages
from .tolerance import Result

Sequence = tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]
"""q (1, Hq, Nq, D), k and v (1, Hkv, Nk, D), and by name gamma_k, gamma_v, key_padding_mask (1, Nk)."""


class Quantised(NamedTuple):
    """A cache's 8-bit dtype, and whether it has a scale for each token and head, not one for the tensor.

    Scales are powers of two, so that what such a cache can hold is exact in 16 bits.
    """

    dtype: torch.dtype
    per_token: bool

    def scales(self, tokens: int, heads: int) -> torch.Tensor:
        """(tokens, heads): the same ones whatever is kept."""
        alternating = (torch.arange(tokens)[:, None] + torch.arange(heads)) % 2 if self.per_token else 0
        return torch.full((tokens, heads), 2.0**-5 if self.dtype == torch.int8 else 2.0**-3) * 2.0**-alternating

    def codes(self, x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """x (tokens, heads, D) as the cache holds it."""
        x = x.float() / scales[..., None].to(x.device)
        return (x.round().clamp(-127, 127) if self.dtype == torch.int8 else x).to(self.dtype)

    def held(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest to x (1, heads, tokens, D) that such a cache can hold."""
        rows = x[0].transpose(0, 1)
        scales = self.scales(*rows.shape[:2])
        return (self.codes(rows, scales).float() * scales[..., None]).transpose(0, 1)[None].to(x.dtype)


def with_sinks(result: Result, sinks: tuple[float, ...]) -> Result:
    """The result with a key more in each head, of this logit and of value 0."""
    out, lse = result
    both = torch.logaddexp(lse.double(), torch.tensor(sinks, dtype=torch.float64, device=lse.device)[:, None])
    return (out.double() * (lse.double() - both).exp()[..., None]).to(out.dtype), both.to(lse.dtype)


def attend_paged(
    sequences: list[Sequence],
    options: dict[str, Any],
    *,
    page: int = 16,
    form: str | None = None,
    quantised: Quantised | None = None,
) -> list[Result]:
    """All in one call of `anchored_attention_paged`, over pages in random order with NaN in slots that nothing is in.

    `write_pages` writes keys, values and, in this `form`, gates. A quantised cache is filled here: what `write_pages`
    rounds, nothing else rounds alike.
    """
    device = sequences[0][0][0].device
    queries, lengths = ([tensors[i].shape[2] for tensors, _ in sequences] for i in (0, 1))
    q, k, v = (torch.cat([x[0].transpose(0, 1) for x in xs]) for xs in zip(*(xs for xs, _ in sequences), strict=True))
    gammas = {name: torch.cat([named[name][0] for _, named in sequences]) for name in sequences[0][1]}
    counts = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(counts) + 1, generator=torch.Generator().manual_seed(0)).split([*counts, 1])
    slots = torch.cat(
        [(pages[:, None] * page + torch.arange(page)).flatten()[:n] for pages, n in zip(order, lengths, strict=False)]
    ).to(device)
    shape = sum(counts) + 1, k.shape[1], page, 2 * k.shape[2]
    cache = torch.full(shape, float("nan"), device=device).to(k.dtype)
    gates = None if form is None else gate_pages(shape[0], page, device, form)
    scales: dict[str, torch.Tensor] = {}
    if quantised is None:
        write_pages(k, v, *cache.chunk(2, -1), slots, gates, **gammas, backend=options["backend"])
    else:
        cache, scales = _quantised_cache(quantised, lengths, (k, v), cache, slots, gates, gammas)
    cu_q = F.pad(torch.tensor(queries), (1, 0)).cumsum(0).to(device, torch.int32)
    held, table = (
        x.to(device, torch.int32) for x in (torch.tensor(lengths), pad_sequence(order[:-1], batch_first=True))
    )
    options = options | scales
    if "sinks" in options:
        options["sinks"] = torch.tensor(options["sinks"], device=device)
    out, lse = anchored_attention_paged(
        q, *cache.chunk(2, -1), cu_seqlens_q=cu_q, seqlens_k=held, block_table=table, max_seqlen_q=max(queries),
        gate_pages=gates, **options, return_lse=True,
    )  # fmt: skip
    return [(o.transpose(0, 1)[None], s.T[None]) for o, s in zip(out.split(queries), lse.split(queries), strict=True)]


def _quantised_cache(
    quantised: Quantised,
    lengths: list[int],
    tokens: tuple[torch.Tensor, torch.Tensor],
    cache: torch.Tensor,
    slots: torch.Tensor,
    gates: GatePages | None,
    gammas: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The cache with K and V in 8 bits, and its scales by name; the gates are filled too."""
    k, v = tokens
    pages, heads, page, _ = cache.shape
    place = slots // page, slice(None), slots % page
    of_k = torch.cat([quantised.scales(n, heads) for n in lengths]).to(k.device)
    of_v = of_k
    if gates is not None:
        gamma_k, gamma_v = gammas["gamma_k"], gammas["gamma_v"]
        if gates.form == "written":
            v = v * (gamma_k * gamma_v)[:, None, None]
            of_v = of_v * (gamma_k * gamma_v)[:, None] if quantised.per_token else of_v
        written = gamma_k if gates.form == "written" else torch.stack([gamma_k.log2(), gamma_v], -1)
        gates.values[place] = written[:, None]
    bits = (
        (cache.nan_to_num(127) if quantised.dtype == torch.int8 else cache.float())
        .to(quantised.dtype)
        .view(torch.uint8)
    )
    codes = [quantised.codes(x, scales).view(torch.uint8) for x, scales in ((k, of_k), (v, of_v))]
    bits[place] = torch.cat(codes, -1)
    if not quantised.per_token:
        return bits.view(quantised.dtype), {"k_scale": of_k.flatten()[:1], "v_scale": of_v.flatten()[:1]}
    found = {}
    for name, scales in (("k_scale", of_k), ("v_scale", of_v)):
        found[name] = torch.full((pages, heads, page), float("nan"), device=cache.device)
        found[name][place] = scales
    return bits.view(quantised.dtype), found
