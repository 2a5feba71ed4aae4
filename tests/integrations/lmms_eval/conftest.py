"""transformers has to be importable beside a CPU build of torch, and attention runs as it does for users without a GPU:
the kernels' own tests interpret them."""

from collections.abc import Iterator

import pytest

from videoanchor_triton.app.torchvision_compat import make_torchvision_importable

make_torchvision_importable()


@pytest.fixture(scope="module", autouse=True)
def _no_interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("videoanchor_triton.kernels.dispatch._interpreted", lambda: False)
        yield
