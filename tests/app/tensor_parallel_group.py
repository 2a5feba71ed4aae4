"""In place of tensor_parallel_launch.py in tests: the same, but the second process dies at the question DEADLY, or,
where VIDEOANCHOR_TEST_HANGS is set, both hang, and the first one says so. Every process leaves a file of its id in the
folder that VIDEOANCHOR_TEST_PIDS names, with the rows of the query projection that it holds.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from videoanchor_triton.app.batch import tensor_parallel_launch

DEADLY = "word9 word9"
PIDS = Path(os.environ.get("VIDEOANCHOR_TEST_PIDS", ""))


def _die_at_deadly_question() -> None:
    from videoanchor_triton.app.commands.shared import prepare_libraries

    prepare_libraries()
    from videoanchor_triton.app.batch.shared_prefill import SharedPrefill

    answer = SharedPrefill.answer

    def dying(self: SharedPrefill, question: str) -> Any:
        model: Any = self._model.base_model
        query = model.language_model.layers[0].self_attn.q_proj.weight
        query = query.to_local() if hasattr(query, "to_local") else query  # transformers 4.57: a plain tensor
        (PIDS / str(os.getpid())).write_text(str(query.shape[0]))
        if question == DEADLY and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return answer(self, question)

    SharedPrefill.answer = dying


class _Hangs:
    def __init__(self) -> None:
        while len(list(PIDS.iterdir())) < 3:
            time.sleep(0.01)
        print("hangs", file=sys.stderr, flush=True)
        time.sleep(1e6)


def _process() -> int | None:
    from videoanchor_triton.app.batch import tensor_parallel_process

    if "VIDEOANCHOR_TEST_HANGS" in os.environ:
        tensor_parallel_process.Channel = _Hangs
    else:
        _die_at_deadly_question()
    return tensor_parallel_process.main()


def _launch() -> int:
    tensor_parallel_launch._PROCESS = "tensor_parallel_group"
    return tensor_parallel_launch.main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])


if __name__ == "__main__":
    (PIDS / str(os.getpid())).touch()
    sys.exit(_process() if "RANK" in os.environ else _launch())
