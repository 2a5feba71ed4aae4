"""The gates: factors (N,), (B, N) or (B, H, N) of keys, values or queries, neutral beyond their length.

H is Hkv, or Hq where every query head has factors of its own. A gate of keys comes as factors (gamma_k), or as their
natural logarithms (log_gamma_k, which within the package is the same argument with `log_gate`).
"""

import math

import torch
import torch.nn.functional as F

POST_EXP_LIMIT = 2.0**20
LOG_LIMIT = 2.0**126  # in base 2 too fp32 holds it


def choose_gate_form(gamma_k: torch.Tensor | None = None, *, log_gamma_k: torch.Tensor | None = None) -> str:
    """The cheapest `gate_form` that all of gamma_k allows: "post-exp" within `[2**-20, 2**20]`, else "log-bias".

    Reads the values on the host, once: call it when a gate is built, not in every attention call.

    Args:
        gamma_k, log_gamma_k: the gate of keys, of any shape, or its natural logarithm: one of the two.

    Raises:
        ValueError: a factor is negative, infinite or NaN; a logarithm is NaN, or beyond `2**126` in size and not -inf.

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
    gate, log_gate = key_gate(gamma_k, log_gamma_k)
    if gate is None:
        raise ValueError("gamma_k or log_gamma_k must be given, got neither")
    check_key_gate_values(gate.detach(), log_gate, False, None)
    low, high = post_exp_bounds(log_gate)
    return "post-exp" if ((gate >= low) & (gate <= high)).all() else "log-bias"


def post_exp_bounds(log_gate: bool) -> tuple[float, float]:
    """Between which gamma_k, or its logarithm, must lie for gate_form="post-exp"."""
    if log_gate:
        # log 2**20 rounded to fp32 is within
        high = math.log(POST_EXP_LIMIT) * (1 + torch.finfo(torch.float32).eps)
        return -high, high
    return 1 / POST_EXP_LIMIT, POST_EXP_LIMIT


def key_gate(gamma_k: torch.Tensor | None, log_gamma_k: torch.Tensor | None) -> tuple[torch.Tensor | None, bool]:
    """The gate of keys that is given, and whether it holds logarithms."""
    if gamma_k is not None and log_gamma_k is not None:
        raise ValueError("log_gamma_k must be None where gamma_k is given, for they are one gate; got both")
    return (gamma_k, False) if log_gamma_k is None else (log_gamma_k, True)


def log_of(gamma_k: torch.Tensor, log_gate: bool) -> torch.Tensor:
    """log gamma_k in fp32 or more, and of a gate that holds logarithms the gate itself."""
    gamma_k = gamma_k.to(torch.promote_types(gamma_k.dtype, torch.float32))
    return gamma_k if log_gate else gamma_k.log()


def expand_gate(gate: torch.Tensor, batch: int, heads: int) -> torch.Tensor:
    """View a gate as (B, H, N), with stride 0 where one value serves several."""
    if gate.dim() == 1:
        gate = gate[None, None]
    elif gate.dim() == 2:
        gate = gate[:, None]
    return gate.expand(batch, heads, gate.shape[-1])


def per_query_head(gate: torch.Tensor | None, kv_heads: int) -> bool:
    """Whether a validated gate (..., H, N) has more heads than there are KV heads."""
    return gate is not None and gate.dim() == 3 and gate.shape[1] != kv_heads


def by_position(gate: torch.Tensor, batch: int, kv_heads: int) -> torch.Tensor:
    """View a gate as (B, Hkv, N), or as it is where it is (B, Hq, N)."""
    return gate if per_query_head(gate, kv_heads) else expand_gate(gate, batch, kv_heads)


def grouped_gate(gate: torch.Tensor, batch: int, kv_heads: int) -> torch.Tensor:
    """View a gate as (B, Hkv, G, N), a KV head's query heads beside one another; G is 1 where they share it."""
    if per_query_head(gate, kv_heads):
        return gate.unflatten(1, (kv_heads, -1))
    return expand_gate(gate, batch, kv_heads)[:, :, None]


def pad_gate(gate: torch.Tensor, length: int, neutral: float = 1.0) -> torch.Tensor:
    """Lengthen the last dimension to `length` with the neutral value, 0 for a gate of logarithms."""
    return F.pad(gate, (0, length - gate.shape[-1]), value=neutral)


def fitted_gate(gate: torch.Tensor | None, dtype: torch.dtype, log_gate: bool = False) -> torch.Tensor | None:
    """A gate for q of `dtype`: fp64 values in fp32 where q is not fp64 too, NaN where fp32 cannot hold them."""
    if gate is None or gate.dtype != torch.float64 or dtype == torch.float64:
        return gate
    fitted, exact = gate.float(), gate.detach()
    size = exact.abs().clamp(min=1) if log_gate else exact.abs()
    held = (fitted.detach().double() - exact).abs() <= torch.finfo(torch.float32).eps * size
    return fitted.masked_fill(~(held | (log_gate & (exact == float("-inf")))), float("nan"))


def check_gate(
    name: str, gate: torch.Tensor, batch: int, heads: tuple[int, ...], length: int, exact: bool = False
) -> None:
    """Raise unless `gate` is a floating (N,), (B, N) or (B, H, N) tensor with N <= length (== length if `exact`).

    H is one of `heads`.
    """
    if not gate.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {gate.dtype}")
    leading = [(), (batch,), *((batch, of_heads) for of_heads in heads)]
    fits = gate.shape[-1] == length if exact and gate.dim() else gate.dim() and gate.shape[-1] <= length
    if tuple(gate.shape[:-1]) not in leading or not fits:
        n = f"{length}" if exact else f"N <= {length}"
        *most, last = (f"({', '.join([*map(str, sizes), n])}{'' if sizes else ','})" for sizes in leading)
        raise ValueError(f"{name} must have shape {', '.join(most)} or {last}, got {tuple(gate.shape)}")


def check_gate_values(
    name: str,
    gate: torch.Tensor,
    visible: torch.Tensor | None,
    low: float = 0.0,
    high: float = float("inf"),
    what: str = "at least 0",
    hides: bool = False,
) -> None:
    """Raise unless every value is finite and within [low, high], except where `visible` (B, N) hides it.

    `what` says so in words. With `hides` -inf is right too.
    """
    wrong = ~(torch.isfinite(gate) & (gate >= low) & (gate <= high))
    if hides:
        wrong = wrong & (gate != float("-inf"))
    if visible is not None and gate.dim():
        wrong = expand_gate(wrong, visible.shape[0], wrong.shape[1] if wrong.dim() == 3 else 1)
        wrong = wrong & visible[:, None, : gate.shape[-1]]
    if wrong.any():
        found = torch.nonzero(wrong)[0].tolist()
        raise ValueError(
            f"{name} must be finite and {what} where the key is visible, and fp32 must hold it unless q is fp64; "
            f"it is not so at {found}"
        )


def check_key_gate_values(gate: torch.Tensor, log_gate: bool, post_exp: bool, visible: torch.Tensor | None) -> None:
    """`check_gate_values` of gamma_k or log_gamma_k."""
    name = "log_gamma_k" if log_gate else "gamma_k"
    if post_exp:
        low, high = post_exp_bounds(log_gate)
        check_gate_values(name, gate, visible, low, high, f"within [{low:g}, {high:g}] for gate_form='post-exp'")
    elif log_gate:
        check_gate_values(name, gate, visible, -LOG_LIMIT, LOG_LIMIT, "at most 2**126 in size, or -inf,", hides=True)
    else:
        check_gate_values(name, gate, visible)
