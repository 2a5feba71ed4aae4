"""The gates: factors (N,), (B, N) or (B, H, N) of keys, values or queries, neutral beyond their length."""

import torch
import torch.nn.functional as F

POST_EXP_LIMIT = 2.0**20


def choose_gate_form(gamma_k: torch.Tensor) -> str:
    """The cheapest `gate_form` that all of gamma_k allows: "post-exp" within `[2**-20, 2**20]`, else "log-bias".

    Reads the values on the host, once: call it when a gate is built, not in every attention call.

    Raises:
        ValueError: a value is negative, infinite or NaN.

    See Also:
        anchored_attention: takes the `gate_form`.

    Examples:
        >>> import torch
        >>> import videoanchor_triton as va
        >>> va.choose_gate_form(1 + 9.5 * torch.rand(8))
        'post-exp'
        >>> va.choose_gate_form(torch.tensor([0.0, 1.0]))
        'log-bias'
    """
    check_gate_values("gamma_k", gamma_k.detach(), None)
    bounded = ((gamma_k >= 1 / POST_EXP_LIMIT) & (gamma_k <= POST_EXP_LIMIT)).all()
    return "post-exp" if bounded else "log-bias"


def expand_gate(gate: torch.Tensor, batch: int, heads: int) -> torch.Tensor:
    """View a gate as (B, H, N), with stride 0 where one value serves several."""
    if gate.dim() == 1:
        gate = gate[None, None]
    elif gate.dim() == 2:
        gate = gate[:, None]
    return gate.expand(batch, heads, gate.shape[-1])


def pad_gate(gate: torch.Tensor, length: int, neutral: float = 1.0) -> torch.Tensor:
    """Lengthen the last dimension to `length` with the neutral value."""
    return F.pad(gate, (0, length - gate.shape[-1]), value=neutral)


def fitted_gate(gate: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A gate for q of `dtype`: fp64 values in fp32 where q is not fp64 too, NaN where fp32 cannot hold them."""
    if gate is None or gate.dtype != torch.float64 or dtype == torch.float64:
        return gate
    fitted, exact = gate.float(), gate.detach()
    held = (fitted.detach().double() - exact).abs() <= torch.finfo(torch.float32).eps * exact.abs()
    return fitted.masked_fill(~held, float("nan"))


def check_gate(name: str, gate: torch.Tensor, batch: int, heads: int, length: int, exact: bool = False) -> None:
    """Raise unless `gate` is a floating (N,), (B, N) or (B, H, N) tensor with N <= length (== length if `exact`)."""
    if not gate.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {gate.dtype}")
    leading = {1: (), 2: (batch,), 3: (batch, heads)}.get(gate.dim())
    fits = gate.shape[-1] == length if exact and gate.dim() else gate.dim() and gate.shape[-1] <= length
    if leading is None or tuple(gate.shape[:-1]) != leading or not fits:
        n = f"{length}" if exact else f"N <= {length}"
        raise ValueError(
            f"{name} must have shape ({n},), ({batch}, {n}) or ({batch}, {heads}, {n}), got {tuple(gate.shape)}"
        )


def check_gate_values(
    name: str, gate: torch.Tensor, visible: torch.Tensor | None, low: float = 0.0, high: float = float("inf")
) -> None:
    """Raise unless every value is finite and within [low, high], except where `visible` (B, N) hides it."""
    wrong = ~(torch.isfinite(gate) & (gate >= low) & (gate <= high))
    if visible is not None and gate.dim():
        wrong = expand_gate(wrong, visible.shape[0], wrong.shape[1] if wrong.dim() == 3 else 1)
        wrong = wrong & visible[:, None, : gate.shape[-1]]
    if wrong.any():
        bounds = "at least 0" if high == float("inf") else f"within [{low:g}, {high:g}] for gate_form='post-exp'"
        found = torch.nonzero(wrong)[0].tolist()
        raise ValueError(
            f"{name} must be finite and {bounds} where the key is visible, and fp32 must hold it unless q is fp64; "
            f"it is not so at {found}"
        )
