"""The scores' kernel in torch: Triton's interpreter takes seconds for a pass."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import state as emulated


def in_torch(state: Tensor, product: Tensor, reflected: Tensor, own: Tensor, settings: Tensor, has_own: bool) -> None:
    """`update_state_kernel` on the CPU."""
    bound, relaxation = settings.tolist()

    def coefficients() -> Tensor:
        shrunk = state - state.clamp(-bound, bound)
        return shrunk.scatter_(1, own, 0.0) if has_own else shrunk

    state += relaxation * (coefficients() + product - state)
    reflected.copy_(2 * coefficients() - state)


class TorchPass:
    """In place of `update_state_kernel`: the same launch, checked as it is."""

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        return self.launch

    def launch(self, *arguments: Any, HAS_OWN: bool, BLOCK: int) -> None:  # noqa: ARG002
        card: Any = emulated.card()
        assert all(x.is_contiguous() for x in arguments[:5])
        state, product, reflected, own, settings = (card.kernel_argument(x) for x in arguments[:5])
        assert len({x.dtype for x in (state, product, reflected, settings)}) == 1
        card.launches += 1
        in_torch(state, product, reflected, own, settings, HAS_OWN)
