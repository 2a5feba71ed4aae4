"""Starts the processes among which a model is split, with torchrun's agent: when one fails, the others are ended.

`python -m THIS N REASONS [ARGUMENT ...]`: N processes of tensor_parallel_process.py, which get the arguments. The file
descriptor REASONS gets why the first of them failed, unless that process has told it itself.
"""

import logging
import os
import sys
import tempfile
import uuid
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

_PROCESS = f"{__package__}.tensor_parallel_process"


def main(n: int, reasons: int, arguments: list[str]) -> int:
    """The exit code of the first process that failed, 0 if none did."""
    logging.disable(logging.CRITICAL)  # the agent's reports of what REASONS says
    with tempfile.TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=n,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)("-P", "-m", _PROCESS, *arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            told = failure.exitcode > 0 and not os.path.isfile(failure.error_file)
            message: Any = failure.message
            if isinstance(message, dict):
                message = message["message"]
            reason = "" if told and rank == 0 else f"process {rank + 1} of {n}: {message}"
            os.write(reasons, reason.encode()[:4000])  # less than a pipe holds: nobody may be reading
            return max(failure.exitcode, 1)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
