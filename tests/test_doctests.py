"""Each public name has an example, and the examples of its docstrings run on the CPU."""

import doctest
from typing import Any

import pytest
import torch

import videoanchor_triton as va


def given(docstring: str) -> dict[str, Any]:
    """What some docstrings say is there already."""
    if "`model`" not in docstring:
        return {}
    import tiny_models as tiny

    return {"model": tiny.build("qwen2_5_vl"), "inputs": tiny.inputs("qwen2_5_vl", [[3, "V", 5]])}


@pytest.mark.parametrize("name", va.__all__)
def test_examples_of_a_public_name_run(name: str) -> None:
    found = {test.name: test for test in doctest.DocTestFinder().find(getattr(va, name), name, globs={})}
    assert found[name].examples, f"the docstring of {name} has no example"
    runner, report = doctest.DocTestRunner(), []
    with torch.random.fork_rng(devices=[]):
        for test in found.values():
            torch.manual_seed(0)
            test.globs.update(given(test.docstring or ""))
            runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)
