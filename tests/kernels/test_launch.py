"""What only the launchers can be asked: split counts, addresses beyond 2**31 elements, the clearing of dead splits."""

import pytest
import torch
from oracle import Problem, assert_as_exact_as_eager

from videoanchor_triton.kernels.api import anchored_attention
from videoanchor_triton.kernels.decode import decode, split_count
from videoanchor_triton.kernels.dispatch import triton_target
from videoanchor_triton.kernels.gates import choose_gate_form
from videoanchor_triton.kernels.ops import varlen_op
from videoanchor_triton.kernels.prefill import prefill

pytestmark = pytest.mark.usefixtures("poisoned_empty")


SPLITS = [
    *((splits, Problem("seven-blocks", queries=3, keys=200)) for splits in (1, 2, 5, 16, 40)),
    (5, Problem("all-keys-padded", queries=3, keys=200, padding="all")),
    (66, Problem("five-merge-steps", 1, 2, 1, 2, 2100, 32, logits=9.0)),
]


@pytest.mark.parametrize(("splits", "problem"), SPLITS, ids=str)
def test_any_number_of_splits_gives_the_same_result(splits: int, problem: Problem, device: torch.device) -> None:
    tensors, options = problem.make(device)
    out = torch.empty_like(tensors[0])
    lse = torch.empty(out.shape[:3], device=device)
    target, _ = triton_target(device)
    assert target is not None
    mask = options.get("key_padding_mask")
    gates = options["gamma_k"], options["gamma_v"]
    decode(*tensors, *gates, mask, out, lse, 32**-0.5, True, None, None, target, splits=splits)
    del options["gamma_q"]
    assert_as_exact_as_eager((out, lse), tensors, options)


@pytest.mark.parametrize(
    ("programs", "keys", "slots", "expected"),
    [(264, 131072, 264, 1), (220, 131072, 264, 1), (4, 131072, 264, 57), (4, 2048, 264, 7), (4, 100, 264, 1)],
)
def test_split_count(programs: int, keys: int, slots: int, expected: int) -> None:
    assert split_count(programs, max(keys // 256, 1), slots) == expected


@pytest.mark.parametrize("queries", [2, 33], ids=["decode", "prefill"])
@pytest.mark.parametrize("place", ["row", "head", "batch", "far-rows"])
def test_elements_beyond_31_bits(
    queries: int, place: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 2**34:
        pytest.skip("needs 16 GiB of GPU memory")
    head_dim = 16
    stride = {"row": (0, 0, 2**22), "head": (0, 2**30, 16), "batch": (2**30, 0, 16), "far-rows": (0, 0, 2**27)}[place]
    keys = {"row": 2**31 // 2**22 + 8, "far-rows": 20}.get(place, 40)
    shape = (3 if place == "batch" else 1, 3 if place == "head" else 1, keys, head_dim)
    # only the pages that the view touches are ever backed by memory
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    store = torch.empty(2**31 + 2**29, dtype=torch.float16, device=device)
    monkeypatch.undo()
    k = store.as_strided(shape, (*stride, 1))
    k.copy_(torch.randn(shape))
    v = torch.randn(shape, dtype=torch.float16, device=device)
    q = torch.randn(shape[0], shape[1], queries, head_dim, dtype=torch.float16, device=device)
    for tensors in ((q, k, v), (q, v, k)):
        found = anchored_attention(*tensors, backend="triton", return_lse=True)
        assert isinstance(found, tuple)
        assert_as_exact_as_eager(found, (q, tensors[1].contiguous(), tensors[2].contiguous()), {})


@pytest.mark.parametrize("post_exp", [False, True], ids=["log-bias", "post-exp"])
@pytest.mark.parametrize(
    "problem",
    [
        Problem("descriptors"),
        Problem("descriptors-D80-window", head_dim=80, gate="per-head", window=21, dtype=torch.bfloat16),
        Problem("descriptors-padding-nan", padding="left-nan", queries=50),
        Problem("descriptors-strides-not-aligned", layout="column", keys=61, causal=False),
    ],
    ids=str,
)
def test_descriptors_load_what_pointers_do(problem: Problem, post_exp: bool, device: torch.device) -> None:
    tensors, options = problem.make(device)
    q = tensors[0]
    target, _ = triton_target(device)
    assert target is not None
    found = []
    for tma in (False, True):
        out = torch.empty(q.shape, dtype=q.dtype, device=device)
        lse = torch.empty(q.shape[:3], device=device)
        gates = options["gamma_k"], options["gamma_v"], options.get("key_padding_mask")
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in tensors)
        choices = problem.causal, problem.window, None, post_exp, target
        prefill(q, k, v, *gates, out, lse, problem.head_dim**-0.5, *choices, tma=tma)
        found.append((out, lse))
    del options["gamma_q"]
    for each in found:
        assert_as_exact_as_eager(each, tensors, options)


def test_rows_beyond_the_longest_named_length_are_nan(device: torch.device) -> None:
    q = torch.randn(100, 2, 16, device=device)
    offsets = torch.tensor([0, 100], dtype=torch.int32, device=device)
    out, _ = varlen_op(q, q, q, offsets, offsets, 20, 100, None, None, 0.25, True, None, None, False)
    computed = int(out.isfinite().all(-1).all(-1).sum())
    assert 20 <= computed < 100
    assert out[:computed].isfinite().all()
    assert out[computed:].isnan().all()


def test_choose_gate_form() -> None:
    assert choose_gate_form(torch.tensor([1.0, 2.0**-20, 2.0**20])) == "post-exp"
    assert choose_gate_form(torch.tensor([1.0, 0.0])) == "log-bias"
    assert choose_gate_form(torch.tensor([1.0, 2.0**21])) == "log-bias"
    with pytest.raises(ValueError, match="gamma_k must be finite"):
        choose_gate_form(torch.tensor([1.0, float("nan")]))
