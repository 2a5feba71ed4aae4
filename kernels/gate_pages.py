"""Gates by slot of a paged KV cache: they lie beside its pages, and go wherever a block of it goes."""

from typing import NamedTuple

import torch

FORMS = ("written", "apart")


class GatePages(NamedTuple):
    """The gates of a paged cache, made by `gate_pages`, filled by `write_pages`, read by `anchored_attention_paged`.

    The form says what the cache holds, and cannot be changed while it holds anything:

    - "written": the cache holds `V' = gamma_k gamma_v V`, a slot gamma_k. The cheapest to read, for gamma_k within
      `2**-20` and `2**20`, where nobody else reads the cache.
    - "apart": the cache holds V, a slot log2 gamma_k and gamma_v. Takes every gate, 0 included, and leaves the cache as
      it is without gates. Where values are quantised token by token, a slot holds gamma_v times the value's scale.

    Attributes:
        values: (P, H, page) fp32 for "written", (P, H, page, 2) fp32 for "apart". H is the number of KV heads, or 1
            where they share their gates.
        form: "written" or "apart".

    Examples:
        The gates that a connector moved with its blocks, taken up again:

        >>> import torch
        >>> import videoanchor_triton as va
        >>> moved = va.gate_pages(4, 16, "cpu").values.clone()
        >>> va.GatePages(moved, "written").values.shape
        torch.Size([4, 1, 16])
    """

    values: torch.Tensor
    form: str


def check_form(form: object) -> None:
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")


def gate_pages(
    n_pages: int, page_size: int, device: torch.device | str, form: str = "written", heads: int = 1
) -> GatePages:
    """Neutral gates for a paged cache of n_pages blocks of page_size slots each.

    Args:
        n_pages, page_size: P and page of the cache (P, Hkv, page, D).
        device: that of the cache.
        form: "written" or "apart", see `GatePages`.
        heads: 1 where the KV heads share their gates, else Hkv.

    Raises:
        TypeError, ValueError: a number is no int of at least 1 (n_pages: 0), or the form is unknown.

    See Also:
        write_pages: fills them, with keys and values. anchored_attention_paged: reads them.

    Examples:
        >>> import videoanchor_triton as va
        >>> va.gate_pages(1024, 16, "cpu").values.shape
        torch.Size([1024, 1, 16])
        >>> va.gate_pages(1024, 16, "cpu", form="apart", heads=4).values.shape
        torch.Size([1024, 4, 16, 2])
    """
    for name, number, least in (("n_pages", n_pages, 0), ("page_size", page_size, 1), ("heads", heads, 1)):
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name} must be an int, got {type(number).__name__}")
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    check_form(form)
    values = torch.ones((n_pages, heads, page_size), dtype=torch.float32, device=device)
    if form == "apart":
        values = torch.stack([torch.zeros_like(values), values], -1)
    return GatePages(values, form)
