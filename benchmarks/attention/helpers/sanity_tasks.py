"""The first section of gpu_check.py: one small call of each form of the kernels."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from benchmarks.helpers.measure import Task, judged
from benchmarks.helpers.record import WRONG, Row
from videoanchor_triton.kernels.sanity import Form, forms


def sanity_tasks(device: torch.device) -> Iterator[Task]:
    """A task for each form; one that crashes strikes off no other."""
    for form in forms(device):
        yield Task(Row("sanity", form.name, "ours"), f"sanity of {form.name}", partial(_judged, form, device))


def _judged(form: Form, device: torch.device, row: Row) -> Row:
    found = form.check(device)
    row = judged(row, found.error, found.allowed)
    return replace(row, reason=f"{row.reason}: {found.what}") if row.status == WRONG else row
