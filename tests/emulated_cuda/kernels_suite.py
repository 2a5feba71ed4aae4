"""Which tests of tests/kernels run on the emulated card: those that put tensors on a device."""

from fnmatch import fnmatchcase

import pytest

COMPILE, OPCHECK = "torch.compile", "opcheck"
STORAGE = "storage whose address could be asked for"
MATH = "fused kernel of torch's SDPA, whose math form makes larger tensors"
# by file::function/case; all others that have the fixture `device` pass there
NOT_EMULATED: dict[str, str] = {
    "*::test_opcheck*": OPCHECK,
    "*::test_*compiles_without_a_break*": COMPILE,
    "*::test_gradients_compile_without_a_break*": COMPILE,
    "test_compiled.py::test_inductor_compiles_once_for_all_lengths": COMPILE,
    "test_self_check.py::test_a_wrong_kernel_is_answered_for_in_a_compiled_graph": COMPILE,
    "test_decode.py::test_triton_reads_no_tensor_on_the_host/*": COMPILE,
    "test_gate_language.py::test_alibi_is_flex_attentions/*": "FlexAttention",
    "test_sdpa.py::test_backward_keeps_no_queries_times_keys/*": STORAGE,
    "test_sdpa.py::test_keys_and_values_are_not_repeated_for_query_heads": MATH,
    "test_sdpa.py::test_no_tensor_of_queries_times_keys/uncapped-*-none-None-*": MATH,
    "test_sdpa.py::test_no_tensor_of_queries_times_keys/uncapped-*-post-exp-per-head-None-*": MATH,
}


def left_out(item: pytest.Item) -> bool:
    """Whether a test is one of the kernels' that knows of no card, so that `make test` has shown all that it shows."""
    return item.path.parent.name == "kernels" and "device" not in getattr(item, "fixturenames", ())


def reason_to_skip(item: pytest.Item) -> str | None:
    name = f"{item.path.name}::{item.name}".replace("[", "/").rstrip("]")
    return next((reason for pattern, reason in NOT_EMULATED.items() if fnmatchcase(name, pattern)), None)
