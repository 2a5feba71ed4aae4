from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:  # noqa: ARG001
    """These tests run under the plugin only: `make test-cuda`."""
    return None if config.pluginmanager.has_plugin("emulated_cuda.plugin") else True
