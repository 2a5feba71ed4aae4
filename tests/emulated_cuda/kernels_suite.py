"""Which tests of tests/kernels run on the emulated card: those that put tensors on a device."""

import pytest

# by file and function; all others that have the fixture `device` pass there
COMPILE, OPCHECK, MATH = "torch.compile", "opcheck", "fused kernel of torch's SDPA: its math form holds N x N scores"
NOT_EMULATED: dict[str, str] = {
    "test_api.py::test_opcheck": OPCHECK,
    "test_api.py::test_opcheck_of_varlen": OPCHECK,
    "test_api.py::test_opcheck_of_a_cache": OPCHECK,
    "test_api.py::test_opcheck_of_the_backward": OPCHECK,
    "test_api.py::test_opcheck_of_the_packed_backward": OPCHECK,
    "test_api.py::test_compiles_without_a_break_and_once_for_growing_keys": COMPILE,
    "test_api.py::test_gradients_compile_without_a_break_and_once_for_growing_keys": COMPILE,
    "test_decode.py::test_triton_reads_no_tensor_on_the_host": COMPILE,
    "test_decode.py::test_compiles_without_a_break_and_once_for_a_growing_cache": COMPILE,
    "test_sdpa.py::test_gradients_compile_without_a_break": COMPILE,
    "test_varlen.py::test_compiles_without_a_break_and_once_for_other_lengths": COMPILE,
    "test_sdpa.py::test_no_tensor_of_queries_times_keys": MATH,
    "test_sdpa.py::test_backward_keeps_no_queries_times_keys": MATH,
}


def left_out(item: pytest.Item) -> bool:
    """Whether a test is one of the kernels' that knows of no card, so that `make test` has shown all that it shows."""
    return item.path.parent.name == "kernels" and "device" not in getattr(item, "fixturenames", ())


def reason_to_skip(item: pytest.Item) -> str | None:
    return NOT_EMULATED.get(f"{item.path.name}::{getattr(item, 'originalname', item.name)}")
