from typing import Any

import pytest
import tiny_models as tiny
from dense_eager import build
from gated_prompts import ONE
from torch import Tensor


@pytest.fixture(params=tiny.BACKBONES)
def backbone(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, build(request.param)


@pytest.fixture
def internvl() -> tuple[Any, dict[str, Tensor]]:
    return build("internvl"), tiny.inputs("internvl", ONE)
