"""One pass over the ADMM state on a GPU, in place of four."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def update_state_kernel(state, product, reflected, own, settings, n_atoms, HAS_OWN: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK atoms of one row of `update_state`, whose arguments these are; `own` counts if HAS_OWN.

    state, product, reflected: (rows, n_atoms).
    """
    i_row, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_atoms = i_block * BLOCK + tl.arange(0, BLOCK)
    m_atoms = o_atoms < n_atoms
    p_atoms = i_row * n_atoms + o_atoms
    bound, relaxation = tl.load(settings), tl.load(settings + 1)
    own_atom = -1
    if HAS_OWN:
        own_atom = tl.load(own + i_row)
    # [BLOCK]
    b_state = tl.load(state + p_atoms, mask=m_atoms)
    b_product = tl.load(product + p_atoms, mask=m_atoms)
    b_clipped = tl.minimum(tl.maximum(b_state, -bound), bound)
    b_coef = tl.where(o_atoms == own_atom, 0.0, b_state - b_clipped)
    b_state += relaxation * (b_coef + b_product - b_state)
    b_clipped = tl.minimum(tl.maximum(b_state, -bound), bound)
    b_coef = tl.where(o_atoms == own_atom, 0.0, b_state - b_clipped)
    tl.store(state + p_atoms, b_state, mask=m_atoms)
    tl.store(reflected + p_atoms, 2 * b_coef - b_state, mask=m_atoms)


def update_state(state: Tensor, product: Tensor, reflected: Tensor, own: Tensor | None, settings: Tensor) -> None:
    """In place: state += relaxation (C + product - state), reflected = 2 C - state, C = shrink(state, bound).

    Args:
        state, product, reflected: (b, K) contiguous, of one dtype.
        own: (b, 1) int64 column whose C is 0 in each row, or None.
        settings: (2,) bound and relaxation, of the same dtype.
    """
    rows, n_atoms = state.shape
    with torch.cuda.device_of(state):  # Triton launches on the current card
        update_state_kernel[(rows, triton.cdiv(n_atoms, BLOCK))](
            state,
            product,
            reflected,
            state if own is None else own,
            settings,
            n_atoms,
            HAS_OWN=own is not None,  # pyright: ignore[reportArgumentType]
            BLOCK=BLOCK,  # pyright: ignore[reportArgumentType]
        )
