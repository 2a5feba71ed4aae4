"""In place of tensor_parallel_launch.py in tests: no model and no second process, but the same messages, and a question
may ask for a mishap. Leaves a line in the file `begun` of the job's score folder for itself and for each row."""

import json
import os
import sys
from pathlib import Path
from typing import Any


def say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def die(reason: str) -> None:
    os.write(int(sys.argv[2]), reason.encode())
    os._exit(1)


job = json.loads(sys.stdin.readline())
begun = Path(job["score_folder"]) / "begun"


def leave(text: str) -> None:
    with begun.open("a") as file:
        file.write(f"{text}\n")


leave(f"{sys.argv[1]} processes")
if job["model"] == "missing":
    say(refused="model missing cannot be loaded")
    sys.exit(2)
if job["model"] == "too-large" or (job["model"] == "once" and begun.read_text().count("processes") > 1):
    die("process 2 of 2: OutOfMemoryError: CUDA out of memory")
say(progress=["load", 0, 0])
say(ready=True)
for line in sys.stdin:
    for row in json.loads(line):
        leave(row["question"])
        say(progress=["tokens", 1, 0])
        if row["question"] == "dies":
            die("process 2 of 2: Signal 9 (SIGKILL) received by PID 7")
        if row["question"] == "dies within a line":
            sys.stdout.write('{"record": {"status": "done"')
            sys.stdout.flush()
            os._exit(1)
        if row["question"] == "hangs":
            sys.stdin.read()
            os._exit(1)
        failed = row["question"] in ("fails", "loses the device")
        record = {"question": row["question"], "status": "failed" if failed else "done"}
        say(record=record | ({"failure": "accelerator"} if failed else {}), broken=failed)
        if failed:
            os._exit(1)
