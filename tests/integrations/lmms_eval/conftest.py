"""Attention runs as it does for users without a GPU: the kernels' own tests interpret them."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _no_interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("videoanchor_triton.kernels.dispatch._interpreted", lambda: False)
        yield
