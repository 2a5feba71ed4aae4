"""Every launch of the package through Triton's own launch path, for five cards; only the launch itself is left out."""

import json
import os
import subprocess
import sys

import pytest

PAGED = "plan_kernel paged_kernel merge_kernel"
FORMS = {
    "prefill": "prefill_kernel",
    "decode": PAGED,
    "cache": PAGED,
    "pages": PAGED,
    "paged": PAGED,
    "write": "write_kernel",
    "varlen": "prescale_kernel prefill_kernel",
    "backward": "prescale_kernel prefill_kernel d_queries_kernel d_keys_kernel",
    "packed backward": "prescale_kernel prefill_kernel d_queries_kernel d_keys_kernel",
    "hopper": "prescale_kernel hopper_kernel",
    "newton": "newton_kernel",
    "swap": "slopes_kernel swap_kernel",
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("target", "precisions"),
    [
        ("sm_80", ["bfloat16:128"]),
        ("sm_89", ["bfloat16:128"]),
        ("sm_90", ["bfloat16:128", "float16:64"]),
        ("sm_100", ["bfloat16:128"]),
        ("sm_120", ["bfloat16:128"]),
    ],
)
def test_each_launch_is_bound_and_compiled_without_a_wait(target: str, precisions: list[str]) -> None:
    """Shared memory, the grid and the device of each tensor are held where it would be launched: else it raises."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    program = [sys.executable, "-m", "emulated_cuda.launch_path", target, *precisions]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    calls = [json.loads(line) for line in done.stdout.splitlines()]
    assert {call["call"].partition(":")[0] for call in calls} == FORMS.keys() - (
        {"hopper"} if target != "sm_90" else set()
    )
    for call in calls:
        assert not call["reads"] + call["uploads"], call
        needed = FORMS[call["call"].partition(":")[0]].split()
        assert [name for name in call["launched"] if name in needed] == needed, call
