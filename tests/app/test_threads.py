"""Waiting threads sleep and fit the quota, settled before torch is there; what the user has set stays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from videoanchor_triton.app import threads
from videoanchor_triton.app.threads import settle_threads, usable_cpus

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setattr(threads, "_cores", lambda: 8)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


V1 = "3:cpuset:/\n1:cpu,cpuacct:/docker/abc\n0::/docker/abc"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, 8, id="none"),
        pytest.param({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 8, id="v2-no-quota"),
        pytest.param({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "250000 100000"}, 2, id="v2-in-container"),
        pytest.param({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1, id="v2-half-a-core"),
        pytest.param({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "9000000 100000"}, 8, id="v2-more-than-all"),
        pytest.param(
            {
                "proc/self/cgroup": "0::/job.slice/step",
                "sys/fs/cgroup/job.slice/step/cpu.max": "max 100000",
                "sys/fs/cgroup/job.slice/cpu.max": "300000 100000",
            },
            3,
            id="v2-of-a-parent",
        ),
        pytest.param(
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            4,
            id="v1-in-container",
        ),
        pytest.param(
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us": "100000",
            },
            8,
            id="v1-no-quota",
        ),
    ],
)
def test_cores_by_the_quota(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    assert usable_cpus(write(tmp_path, files)) == expected


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    settle_threads()
    assert {name: os.environ.get(name) for name in NAMES} == dict.fromkeys(NAMES) | {"OMP_WAIT_POLICY": "PASSIVE"}
    monkeypatch.setattr(threads, "usable_cpus", lambda: 3)
    settle_threads()
    assert os.environ["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize("given", [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "7"), ("OMP_NUM_THREADS", "5")])
def test_what_is_set_stays(given: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*given)
    monkeypatch.setattr(threads, "usable_cpus", lambda: 3)
    settle_threads()
    assert os.environ[given[0]] == given[1]
    assert (os.environ.get("OMP_WAIT_POLICY") == "PASSIVE") == (given[0] == "OMP_NUM_THREADS")


def test_settled_before_torch_is_imported() -> None:
    code = (
        "import os, sys\nfrom videoanchor_triton.app import cli\nassert 'torch' not in sys.modules\n"
        "class Watch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            print(os.environ.get('OMP_WAIT_POLICY')); os._exit(0)\n"
        "sys.meta_path.insert(0, Watch())\n"
        "cli.main(['info'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "PASSIVE\n", done.stderr
