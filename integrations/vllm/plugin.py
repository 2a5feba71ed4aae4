# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
"""What vLLM loads in each of its processes, by the entry point of group `vllm.general_plugins`: nothing heavy is
imported with this module, since vLLM only logs an exception of the import."""

import multiprocessing
import os
import signal
import threading
from typing import Any

ENDS_WITH_PARENT = "VIDEOANCHOR_ENDS_WITH_PARENT"
"""Environment variable: 1 has vLLM's processes end with the one that has started them, however that one ends."""
_FOLDER = __name__.rpartition(".")[0]


def register() -> None:
    """Registers the gated models and the attention that takes their gate. May be called again.

    Without `"videoanchor"` in `--additional-config` all of it does what vLLM does without it.
    """
    import vllm
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from .architectures import ARCHITECTURES

    _end_with_parent()
    register_backend(AttentionBackendEnum.CUSTOM, f"{_FOLDER}.attention.GatedTritonBackend")
    if current_platform.is_cpu():  # its platform takes no other backend than this one
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{_FOLDER}.{_cpu_backend()}")
    for architecture in ARCHITECTURES:
        # the version in the name: vLLM caches what it finds in a class by this name
        ModelRegistry.register_model(architecture, f"{_FOLDER}.models:{architecture}@{vllm.__version__}")
    _check_at_start(type(current_platform))


def _end_with_parent() -> None:
    """vLLM's processes outlive a command that is killed by `kill -9`, and keep the GPU."""
    parent = multiprocessing.parent_process()
    if parent is None or os.environ.get(ENDS_WITH_PARENT) != "1":
        return

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="videoanchor-ends-with-parent", daemon=True).start()


def _cpu_backend() -> str:
    """That of GPUs where Triton's interpreter stands in for one."""
    from vllm.triton_utils import HAS_TRITON

    interpreted = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
    return "attention.GatedTritonBackendOnCPU" if interpreted else "cpu_attention.GatedCPUBackend"


def _check_at_start(platform: type[Any]) -> None:
    """Has every new `VllmConfig` be checked, before anything is loaded: vLLM calls the platform's hook then, and has
    none for other plug-ins."""
    hook = platform.check_and_update_config
    if getattr(hook, "checks_videoanchor", False):
        return

    def check_and_update_config(_: type[Any], vllm_config: Any) -> None:
        from .settings import check

        hook(vllm_config)
        check(vllm_config)

    check_and_update_config.checks_videoanchor = True  # pyright: ignore[reportFunctionMemberAccess]
    platform.check_and_update_config = classmethod(check_and_update_config)
