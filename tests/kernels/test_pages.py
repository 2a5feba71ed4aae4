"""Keys, values and gates of a step in their slots of a paged cache, against fp64."""

import zlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from videoanchor_triton.kernels import validation
from videoanchor_triton.kernels.api_paged import write_pages
from videoanchor_triton.kernels.gate_pages import GatePages, gate_pages
from videoanchor_triton.kernels.validation_paged import DEBUG

BACKENDS = ("triton", "sdpa")
NAN, INF = float("nan"), float("inf")
E4M3, INT8 = torch.float8_e4m3fn, torch.int8
TOPS = {E4M3: 448.0, INT8: 127.0}
FP32 = torch.finfo(torch.float32)


@dataclass(frozen=True)
class Step:
    """Named step of tokens; `make` draws what `write_pages` takes from a seed of the name, into pages full of NaN."""

    name: str
    tokens: int = 37
    pages: int = 9
    page_size: int = 8
    kv_heads: int = 2
    head_dim: int = 24
    dtype: torch.dtype = torch.float32
    cache: torch.dtype | None = None
    per_token: bool = False
    form: str | None = "written"
    gate_heads: int = 1
    gates: tuple[str, ...] = ("gamma_k", "gamma_v")
    layout: str = "pages"
    slots: torch.dtype = torch.int64

    def __str__(self) -> str:
        return self.name

    def make(self, device: torch.device) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        shape = self.pages, self.kv_heads, self.page_size, self.head_dim
        k, v = (torch.randn(self.tokens, *shape[1::2], generator=generator).to(self.dtype) for _ in range(2))
        v[3] = 0
        if self.layout == "halves":
            k, v = torch.cat([k, v, v], -1).split(self.head_dim, -1)[:2]
            k_pages, v_pages = self._empty(*shape[:3], 2 * self.head_dim).split(self.head_dim, -1)
        elif self.layout == "rows":
            k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v))
            k_pages, v_pages = (self._empty(shape[0], *shape[2:0:-1], shape[3]).transpose(1, 2) for _ in range(2))
        else:
            k_pages, v_pages = self._empty(*shape), self._empty(*shape)
        slots = torch.randperm(self.pages * self.page_size, generator=generator)[: self.tokens].to(self.slots)
        slots[1], slots[-2] = -1, -7
        k[1], v[1] = NAN, NAN
        made: dict[str, Any] = {"k": k, "v": v, "k_pages": k_pages, "v_pages": v_pages, "slot_mapping": slots}
        if self.form is not None:
            values = gate_pages(self.pages, self.page_size, "cpu", self.form, self.gate_heads).values
            made["gate_pages"] = GatePages(torch.full_like(values, NAN).to(device), self.form)
        for name in self.gates if self.form else ():
            gate = torch.rand(self.tokens, *([self.gate_heads] if self.gate_heads > 1 else []), generator=generator)
            most = 8 if self.dtype == torch.float16 and self.cache is None else 20  # V' must be within fp16
            gate = most * (2 * gate - 1) if name != "gamma_v" else 1 + 2.5 * gate
            gate = gate.exp2() if name == "gamma_k" else gate * 0.69 if name == "log_gamma_k" else gate
            gate[1] = NAN  # of no slot
            made[name] = torch.stack([gate, -gate], -1)[..., 0]  # by strides
        if self.cache is not None:
            of_slots = torch.full(shape[:3], NAN)
            for name, x in (("k_scale", k), ("v_scale", v)):
                tensor = x[torch.arange(self.tokens) != 1].float().abs().amax() / TOPS[self.cache] / 2
                made[name] = of_slots.clone() if self.per_token else tensor
        return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in made.items()}

    def _empty(self, *shape: int) -> torch.Tensor:
        x = torch.full(shape, 77.0 if self.cache == INT8 else NAN)
        return x.to(self.cache or self.dtype)


def factors(given: dict[str, Any], name: str, heads: int) -> torch.Tensor:
    """(T, heads) fp64 of gamma_k or gamma_v."""
    tokens = given["k"].shape[0]
    gate = given.get(name)
    if name == "gamma_k" and given.get("log_gamma_k") is not None:
        gate = given["log_gamma_k"].double().exp()
    gate = torch.ones(tokens).double() if gate is None else gate.double().cpu()
    return (gate[:, None] if gate.dim() == 1 else gate).expand(tokens, heads)


def half_step(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half of the distance between neighbours of `dtype` around x."""
    if dtype == INT8:
        return torch.full_like(x, 0.5)
    limits = torch.finfo(dtype)
    return x.abs().clamp(min=limits.smallest_normal).log2().floor().exp2() * limits.eps / 2


def assert_written(given: dict[str, Any], before: dict[str, torch.Tensor]) -> None:
    """Each token's row is what fp64 gives, rounded once; nothing else has changed."""
    k, v = (given[name].double().cpu() for name in ("k", "v"))
    cache = given["k_pages"].dtype
    kv_heads, size = k.shape[1], given["k_pages"].shape[2]
    gates: GatePages | None = given.get("gate_pages")
    gamma_k, gamma_v = (factors(given, name, kv_heads) for name in ("gamma_k", "gamma_v"))
    if gates is not None and gates.form == "written":
        v = v * (gamma_k * gamma_v)[..., None]
    kept = [(t, divmod(int(slot), size)) for t, slot in enumerate(given["slot_mapping"].tolist()) if slot >= 0]
    token = torch.tensor([t for t, _ in kept])
    page, row = torch.tensor([place for _, place in kept]).T

    def at(x: torch.Tensor) -> torch.Tensor:
        x = x.cpu()
        return (x.view(torch.uint8)[page, :, row].view(x.dtype) if x.element_size() == 1 else x[page, :, row]).double()

    gain = gamma_v[token]
    for name, x in (("k", k[token]), ("v", v[token])):
        scale = torch.ones(1, 1, dtype=torch.float64)
        if cache in TOPS:
            found = given[f"{name}_scale"]
            scale = at(found) if found.dim() == 3 else found.double().cpu().reshape(1, 1)
            if found.dim() == 3:
                wanted = x.abs().amax(-1) / TOPS[cache]
                assert ((scale - wanted).abs() <= 1e-6 * wanted + 2 * FP32.tiny).all(), f"{name}_scale"
                gain = gain * scale if name == "v" else gain
        wanted = x / scale[..., None]
        if cache in TOPS:
            wanted = wanted.clamp(-TOPS[cache], TOPS[cache])
        allowed = half_step(wanted, cache) * (1 + 1e-5) + 1e-6 * wanted.abs()
        assert ((at(given[f"{name}_pages"]) - wanted).abs() <= allowed).all(), name
    if gates is not None:
        heads, values = gates.values.shape[1], at(gates.values)
        of_gate = gamma_k[token][:, :heads]
        if gates.form == "apart":
            torch.testing.assert_close(values[..., 0], of_gate.log2(), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(values[..., 1], gain[:, :heads], rtol=1e-6, atol=0)
        else:
            torch.testing.assert_close(values, of_gate, rtol=4e-6, atol=0)
    for name, old in before.items():
        new = bits(given[name])
        if new.dim() > 1:
            new[page, :, row] = old[page, :, row]
        assert torch.equal(new, old), f"{name} changed elsewhere"


def bits(x: torch.Tensor | GatePages) -> torch.Tensor:
    x = x.values if isinstance(x, GatePages) else x
    return (
        x.detach().cpu().contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]).clone()
    )


def written(given: dict[str, Any], backend: str) -> dict[str, torch.Tensor]:
    """Write, and return the bits of before."""
    changed = ("k_pages", "v_pages", "gate_pages", *(("k_scale", "v_scale") if "k_scale" in given else ()))
    before = {name: bits(given[name]) for name in changed if name in given}
    write_pages(**given, backend=backend)
    return before


STEPS = [
    Step("ungated", form=None),
    Step("ungated-halves-bf16", form=None, layout="halves", dtype=torch.bfloat16, page_size=1, pages=80),
    Step("written"),
    Step("written-gates-of-heads-int32-slots", gate_heads=2, slots=torch.int32),
    Step("written-log-gates-fp16", gates=("log_gamma_k", "gamma_v"), dtype=torch.float16, page_size=16),
    Step("written-neutral", gates=()),
    Step("written-one-token-of-three-heads-bf16", tokens=5, kv_heads=3, head_dim=72, dtype=torch.bfloat16),
    Step("written-halves-bf16", layout="halves", dtype=torch.bfloat16, page_size=48),
    Step("written-rows-of-heads", layout="rows", page_size=3, pages=20),
    Step("apart", form="apart"),
    Step("apart-log-gates-of-heads-halves-fp16", form="apart", gate_heads=2, gates=("log_gamma_k",), layout="halves"),
    Step("apart-values-only-bf16", form="apart", gates=("gamma_v",), dtype=torch.bfloat16),
    Step("e4m3-ungated", form=None, cache=E4M3, dtype=torch.bfloat16),
    Step("e4m3-per-token", form=None, cache=E4M3, per_token=True),
    Step("e4m3-written-per-token-bf16", cache=E4M3, per_token=True, dtype=torch.bfloat16, layout="halves"),
    Step("e4m3-apart-per-token", form="apart", cache=E4M3, per_token=True, gate_heads=2),
    Step("int8-written", cache=INT8, gates=("gamma_v",)),
    Step("int8-written-per-token-fp16", cache=INT8, per_token=True, dtype=torch.float16),
    Step("int8-apart-per-token", form="apart", cache=INT8, per_token=True, gate_heads=2, layout="rows"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", STEPS, ids=str)
def test_rows_are_what_fp64_gives(step: Step, backend: str, device: torch.device) -> None:
    given = step.make(device)
    assert_written(given, written(given, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("cache", "numbers", "kept"),
    [
        (E4M3, (17.0, 19.0, 447.0, 1e4, -INF, 2.0**-10, 3 * 2.0**-10, NAN), (16, 20, 448, 448, -448, 0, 2.0**-8, NAN)),
        (INT8, (0.5, 1.5, -2.5, 126.5, 127.5, 1e4, -1e4, -0.4), (0, 2, -2, 126, 127, 127, -127, 0)),
    ],
    ids=str,
)
def test_quantised_numbers_are_rounded_to_even_and_bounded(
    cache: torch.dtype, numbers: tuple[float, ...], kept: tuple[float, ...], backend: str, device: torch.device
) -> None:
    k = torch.tensor(numbers * 2, device=device).view(1, 1, 16)
    pages = torch.zeros(1, 1, 4, 16, device=device).to(cache)
    one = torch.ones((), device=device)
    write_pages(k, k, pages, pages.clone(), torch.tensor([2], device=device), k_scale=one, v_scale=one, backend=backend)
    torch.testing.assert_close(pages[0, 0, 2].float()[:8].cpu(), torch.tensor(kept).float(), equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["written", "apart"])
def test_what_a_form_cannot_hold_is_nan(
    form: str, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where values are not looked at, as on a GPU."""
    monkeypatch.setattr(validation, "values_are_free", lambda _: False)
    monkeypatch.setattr("videoanchor_triton.kernels.validation_paged.values_are_free", lambda _: False)
    gamma_k = torch.tensor([1.0, 2.0**-21, 2.0**21, 0.0, -1.0, INF, NAN, 1.0, 1.0, 2.0**20, 2.0**-20])
    gamma_v = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, INF, NAN, 1.0, 1.0])
    x = torch.ones(11, 1, 16, device=device)
    pages = torch.zeros(2, 11, 1, 1, 16, device=device)
    gates = gate_pages(11, 1, device, form)
    slots = torch.arange(11, device=device)
    gammas = {"gamma_k": gamma_k.to(device), "gamma_v": gamma_v.to(device)}
    write_pages(x, x, pages[0], pages[1], slots, gates, **gammas, backend=backend)
    seen = gates.values.reshape(11, -1).sum(-1).isnan().cpu()
    held = (gamma_k >= 2.0**-20) & (gamma_k <= 2.0**20) if form == "written" else (gamma_k >= 0) & (gamma_k < INF)
    assert torch.equal(seen, ~(held & gamma_v.isfinite()))
    if form == "apart":
        gammas = {"log_gamma_k": torch.tensor([100.0, -INF, INF, NAN], device=device)}
        write_pages(x[:4], x[:4], pages[0], pages[1], slots[:4], gates, **gammas, backend=backend)
        wanted = torch.tensor([144.2695, -INF, NAN, NAN])
        torch.testing.assert_close(gates.values[:4, 0, 0, 0].cpu(), wanted, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_that_are_not_finite_are_seen_in_scales_of_tokens(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("videoanchor_triton.kernels.validation_paged.values_are_free", lambda _: False)
    k = torch.ones(3, 1, 16, device=device)
    k[1, 0, 5], k[2, 0, 7] = NAN, INF
    pages = torch.zeros(2, 1, 1, 4, 16, dtype=INT8, device=device)
    scales = torch.zeros(2, 1, 1, 4, device=device)
    slots = torch.arange(3, device=device)
    write_pages(k, k, pages[0], pages[1], slots, k_scale=scales[0], v_scale=scales[1], backend=backend)
    assert scales[:, 0, 0].isnan().tolist() == [[False, True, True, False]] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_token_and_slots_beyond_the_cache(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("videoanchor_triton.kernels.validation_paged.values_are_free", lambda _: False)
    around = torch.zeros(2, 9, 1, 4, 16, device=device)
    pages, gates = around[:, 4:5], torch.zeros(9, 1, 4, device=device)
    x, gamma = torch.ones(4, 1, 16, device=device), torch.ones(4, device=device)
    slots = torch.tensor([-1, 4, -7, 2**40], device=device)
    write_pages(x[:0], x[:0], pages[0], pages[1], slots[:0], backend=backend)
    write_pages(x, x, pages[0], pages[1], slots, GatePages(gates[4:5], "written"), gamma, backend=backend)
    assert not around.any()
    assert not gates.any()


def valid(**change: Any) -> dict[str, Any]:
    k, pages = torch.zeros(3, 2, 16), torch.zeros(4, 2, 8, 16)
    given = {"k": k, "v": k, "k_pages": pages, "v_pages": pages.clone(), "slot_mapping": torch.arange(3)}
    return given | {"gate_pages": gate_pages(4, 8, "cpu"), "gamma_k": torch.ones(3)} | change


def quantised(**change: Any) -> dict[str, Any]:
    pages, one = torch.zeros(4, 2, 8, 16, dtype=INT8), torch.ones(1)
    return valid(k_pages=pages, v_pages=pages.clone(), k_scale=one, v_scale=one) | change


INVALID: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "k-dimensions": (ValueError, r"k must have shape \(tokens, heads, D\)", {"k": torch.zeros(3, 16)}),
    "k-8-bits": (TypeError, "k must be a floating tensor of 16 bits", {"k": torch.zeros(3, 2, 16).to(E4M3)}),
    "k-list": (TypeError, "k must be a tensor", {"k": [1.0]}),
    "v-shape": (ValueError, "k and v must be", {"v": torch.zeros(2, 2, 16)}),
    "v-dtype": (ValueError, "k and v must be", {"v": torch.zeros(3, 2, 16).half()}),
    "heads": (ValueError, "k and v must be", {name: torch.zeros(3, 4, 16) for name in "kv"}),
    "pages-head-dim": (ValueError, "k_pages must have shape", {"k_pages": torch.zeros(4, 2, 8, 8)}),
    "no-pages": (ValueError, "k_pages must have shape", {f"{n}_pages": torch.zeros(0, 2, 8, 16) for n in "kv"}),
    "pages-dtype": (TypeError, "k_pages must have k's dtype", {"k_pages": torch.zeros(4, 2, 8, 16).half()}),
    "v-pages-dtype": (TypeError, "v_pages must have k_pages' dtype", {"v_pages": torch.zeros(4, 2, 8, 16).half()}),
    "v-pages-size": (ValueError, "v_pages must have k_pages' shape", {"v_pages": torch.zeros(4, 2, 4, 16)}),
    "v-pages-strides": (
        ValueError,
        "v_pages must have k_pages' shape",
        {"v_pages": torch.zeros(4, 8, 2, 16).transpose(1, 2)},
    ),
    "slots-float": (TypeError, "slot_mapping must be", {"slot_mapping": torch.zeros(3)}),
    "slots-short": (ValueError, r"slot_mapping must have shape \(3,\)", {"slot_mapping": torch.arange(2)}),
    "slots-beyond": (
        ValueError,
        "slot_mapping must be below .* 32 slots, got 32",
        {"slot_mapping": torch.arange(30, 33)},
    ),
    "slots-device": (ValueError, "slot_mapping must be on k's device", {"slot_mapping": torch.arange(3).to("meta")}),
    "gate-without-pages": (ValueError, "gamma_k must be None without gate_pages", {"gate_pages": None}),
    "gate-twice": (ValueError, "log_gamma_k must be None where gamma_k", {"log_gamma_k": torch.zeros(3)}),
    "gate-shape": (ValueError, "gamma_v must have shape", {"gamma_v": torch.ones(2)}),
    "gate-heads": (ValueError, r"gamma_k must have shape \(3,\) or \(3, 1\)", {"gamma_k": torch.ones(3, 2)}),
    "gate-integers": (TypeError, "gamma_k must be a floating", {"gamma_k": torch.ones(3).int()}),
    "gate-0-written": (
        ValueError,
        "gamma_k must be of a gamma_k within",
        {"gamma_k": torch.tensor([1.0, 0.0, 1.0])},
    ),
    "log-gate-large": (
        ValueError,
        "log_gamma_k must be of a gamma_k within",
        {"gamma_k": None, "log_gamma_k": torch.tensor([0.0, 14.0, 0.0])},
    ),
    "gate-v-negative": (ValueError, "gamma_v must be finite", {"gamma_v": -torch.ones(3)}),
    "pages-tuple": (TypeError, "gate_pages must be GatePages", {"gate_pages": torch.ones(4, 1, 8)}),
    "pages-form": (ValueError, "form must be one of", {"gate_pages": GatePages(torch.ones(4, 1, 8), "log")}),
    "pages-of-another-form": (
        ValueError,
        "gate_pages of the form 'apart' must have values of shape",
        {"gate_pages": GatePages(torch.ones(4, 1, 8), "apart")},
    ),
    "pages-of-another-size": (ValueError, "gate_pages of the form 'written'", {"gate_pages": gate_pages(4, 4, "cpu")}),
    "pages-too-few": (ValueError, "gate_pages of the form 'written'", {"gate_pages": gate_pages(3, 8, "cpu")}),
    "pages-device": (ValueError, "gate_pages must be on the cache's", {"gate_pages": gate_pages(4, 8, "meta")}),
    "pages-dtype-of-gates": (
        TypeError,
        "gate_pages.values must be a float32",
        {"gate_pages": GatePages(torch.ones(4, 1, 8).half(), "written")},
    ),
    "pairs-apart": (
        ValueError,
        "gate_pages' pairs must lie together",
        {"gate_pages": GatePages(torch.ones(2, 4, 1, 8).permute(1, 2, 3, 0), "apart")},
    ),
    "scale-not-quantised": (ValueError, "k_scale must be None", {"k_scale": torch.ones(1)}),
    "scale-missing": (ValueError, "v_scale must be given", quantised(v_scale=None)),
    "scale-dtype": (TypeError, "k_scale must be a float32", quantised(k_scale=torch.ones(1).half())),
    "scale-shape": (ValueError, "k_scale must have one element or shape", quantised(k_scale=torch.ones(4, 2))),
    "scales-mixed": (ValueError, "v_scale must have k_scale's shape", quantised(v_scale=torch.ones(4, 2, 8))),
    "scales-apart-shared": (
        ValueError,
        "gate_pages must have the cache's 2 heads",
        quantised(**{f"{n}_scale": torch.ones(4, 2, 8) for n in "kv"}, gate_pages=gate_pages(4, 8, "cpu", "apart")),
    ),
    "nan-in-int8": (ValueError, "v must be finite for a cache of int8", quantised(v=torch.full((3, 2, 16), NAN))),
    "grad": (
        ValueError,
        "write_pages has no backward, and v requires grad",
        {"v": torch.zeros(3, 2, 16).requires_grad_()},
    ),
    "backend": (ValueError, "backend must be one of", {"backend": "flash"}),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_arguments_are_refused(name: str) -> None:
    kind, message, change = INVALID[name]
    with pytest.raises(kind, match=message):
        write_pages(**valid(**change))


def test_debug_looks_at_values_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("videoanchor_triton.kernels.validation_paged.values_are_free", lambda _: False)
    given = valid(slot_mapping=torch.tensor([0, 1, 32]))
    monkeypatch.setenv(DEBUG, "0")
    write_pages(**given)
    monkeypatch.setenv(DEBUG, "1")
    with pytest.raises(ValueError, match="slot_mapping must be below"):
        write_pages(**given)
    monkeypatch.setenv(DEBUG, "yes")
    with pytest.raises(ValueError, match=f"{DEBUG} must be 0 or 1, got 'yes'"):
        write_pages(**given)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (((2.0, 8), {}), TypeError, "n_pages must be an int"),
        (((-1, 8), {}), ValueError, "n_pages must be at least 0"),
        (((2, 0), {}), ValueError, "page_size must be at least 1"),
        (((2, 8), {"heads": True}), TypeError, "heads must be an int"),
        (((2, 8), {"form": "folded"}), ValueError, "form must be one of"),
    ],
    ids=["float", "negative", "empty-page", "bool", "form"],
)
def test_gate_pages_refuse(arguments: Any, kind: type[Exception], message: str) -> None:
    (pages, size), options = arguments
    with pytest.raises(kind, match=message):
        gate_pages(pages, size, "cpu", **options)


def test_refused_where_no_kernel_takes_it(device: torch.device) -> None:
    pages = torch.zeros(2, 4, 1, 8, 300, device=device)
    x = torch.zeros(1, 1, 300, device=device)
    with pytest.raises(ValueError, match="the head dim is 300, the kernels over pages take 16 to 256"):
        write_pages(x, x, pages[0], pages[1], torch.zeros(1, device=device).int(), backend="triton")
