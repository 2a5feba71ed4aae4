"""How far a result is from the fp64 oracle, and how far it may be: shared by all correctness checks."""

import zlib
from collections.abc import Callable
from typing import Any

import torch

from videoanchor_triton.kernels.tolerance import Tensors, allowed_error, compare, error

Finding = tuple[float, float]  # error, allowed error
Check = Callable[[torch.device], Finding]
GRADIENTS = ("q", "k", "v", "gamma_k", "gamma_v")


def generator(name: str) -> torch.Generator:
    """Seeded by a case's name."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def worst(findings: list[Finding]) -> Finding:
    """The finding with the largest part of its allowance used up; a NaN is worst of all."""

    def used(finding: Finding) -> float:
        wrong, allowed = finding
        if wrong == 0:  # an empty sequence allows nothing and errs nowhere
            return 0.0
        return wrong / allowed if wrong == wrong and allowed > 0 else float("inf")

    return max(findings, key=used)


def outcome(found: tuple[torch.Tensor, torch.Tensor], tensors: Tensors, options: dict[str, Any]) -> Finding:
    """The worse of out and lse of one dense call."""
    return worst([(wrong, allowed) for _, wrong, allowed in compare(found, tensors, options)])


def gradients(
    attend: Callable[..., Any], tensors: Tensors, options: dict[str, Any], upstream: tuple[torch.Tensor, ...]
) -> list[torch.Tensor]:
    """Gradients of q, k, v and of the gates among the options, given those of out and lse."""
    leaves = {name: x.detach().requires_grad_() for name, x in zip(GRADIENTS, tensors, strict=False)}
    leaves |= {name: options[name].detach().requires_grad_() for name in GRADIENTS[3:] if name in options}
    given = options | {name: x for name, x in leaves.items() if name in options}
    outputs = attend(*[leaves[name] for name in GRADIENTS[:3]], **given)
    received = [gradient.to(x.dtype) for gradient, x in zip(upstream, outputs, strict=True)]
    return list(torch.autograd.grad(outputs, list(leaves.values()), received))


def gradient_finding(found: list[torch.Tensor], eager: list[torch.Tensor], exact: list[torch.Tensor]) -> Finding:
    """The worst gradient; allowed is `allowed_error`."""
    findings = []
    for mine, theirs, true in zip(found, eager, exact, strict=True):
        allowed = allowed_error(true, error(theirs, true), mine.dtype)
        findings.append((error(mine, true) if mine.isfinite().all() else float("inf"), allowed))
    return worst(findings)
