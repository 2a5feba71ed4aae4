"""How many threads torch starts and what they do while they wait: settled before torch is imported, and not after.

OpenMP's threads spin while they wait for one another. Where another process has the core of one of them, or a container
may use less than its cores, the others burn their time until it comes back: a solver of many small steps then takes ten
times as long with two threads as with one.
"""

import os
from pathlib import Path, PurePosixPath

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def settle_threads() -> None:
    """Lets waiting threads sleep, and starts no more threads than a container's quota of processor time is worth, here
    and in the processes that inherit this environment. What it says already stays."""
    if not any(name in os.environ for name in _WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    if usable_cpus() < _cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cpus()))


def passed_on() -> dict[str, str]:
    """What processes of another machine have to be told, which do not inherit this environment."""
    return {name: os.environ[name] for name in _WAITING if name in os.environ}


def usable_cpus(root: Path = Path("/")) -> int:
    """Cores that this process may run on, or those that the quota of its control groups is worth, whichever is less.

    Args:
        root: the folder of `proc` and `sys`.
    """
    return max(int(min([_cores(), *_quotas(root)])), 1)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quotas(root: Path) -> list[float]:
    """Of this process's control group and of those around it, version 1 or 2, in cores."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    quotas = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
            group = PurePosixPath(name)
            quotas += [_quota(mount / one.relative_to("/")) for one in (group, *group.parents)]
    return [quota for quota in quotas if quota is not None]


def _quota(group: Path) -> float | None:
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except OSError:
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)
