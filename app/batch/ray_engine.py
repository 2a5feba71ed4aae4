"""A batch on Ray Data: an actor with a model of its own for each GPU, or for each few that share one by tensor
parallelism, on this machine or on a cluster.

Every video is a block, and every result leaves its actor at once. Where an actor dies, Ray starts another one and gives
it the video again; a row at which `MAX_DEATHS` actors have died fails. The results file, synced row by row by the
driver, is the checkpoint: what it holds is not asked again, and `ResultsLog` writes no row twice.
"""

import json
import logging
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from ...integrations.errors import InputError
from ..termination import keeping_handler
from ..threads import passed_on
from .job import Groups
from .results import Record
from .worker import BatchJob, BatchWorker, failed

MAX_DEATHS = 3

MakeWorker = Callable[[BatchJob], Any]
"""Makes what answers rows as `BatchWorker` does, within an actor."""


class _Begun:
    """Counts how often a row was begun and not ended: so many actors died there."""

    def __init__(self) -> None:
        self._deaths: Counter[str] = Counter()

    def deaths(self, key: str) -> int:
        return self._deaths[key]

    def begin(self, key: str) -> None:
        self._deaths[key] += 1

    def end(self, key: str) -> None:
        del self._deaths[key]


class _Actor:
    def __init__(self, make_worker: MakeWorker, job: BatchJob, begun: Any) -> None:
        self._settings_hash, self._begun = job.settings_hash(), begun
        self._worker = make_worker(job)

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[str]]]:
        """One result a row, in the order of the rows: Ray drops as many of a second attempt as it has of the first."""
        import ray

        rows = pickle.loads(batch["rows"][0])
        keys = [row.key(self._settings_hash) for row in rows]
        deaths = ray.get([self._begun.deaths.remote(key) for key in keys])
        answers = self._worker.answer([row for row, n in zip(rows, deaths, strict=True) if n < MAX_DEATHS])
        for row, key, n in zip(rows, keys, deaths, strict=True):
            if n < MAX_DEATHS:
                ray.get(self._begun.begin.remote(key))
                record = next(answers)
                ray.get(self._begun.end.remote(key))
            else:
                record = failed(row, self._settings_hash, f"{n} actors died at this row: see Ray's logs")
            yield {"record": [json.dumps(record)]}


def ray_engine(
    job: BatchJob,
    groups: Groups,
    *,
    n_actors: int | None = None,
    gpus_per_actor: float | None = None,
    make_worker: MakeWorker = BatchWorker,
) -> Iterator[Record]:
    """Answers rows by actors of a Ray cluster: the one that RAY_ADDRESS names or that runs on this machine, else one
    that is started here and ends with the job.

    Args:
        n_actors: default: as many as there are GPUs for; 1 without a GPU.
        gpus_per_actor: default: one for each process that shares its model, on one machine, or 0 where the cluster has
            none.
        make_worker: see `MakeWorker`.

    Raises:
        InputError: the cluster lacks what the actors need, or they cannot load the model.
    """
    with keeping_handler():
        import ray
        from ray.exceptions import RayError

        started_here = not ray.is_initialized()
        if started_here:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        gpus = ray.cluster_resources().get("GPU", 0.0)
        each = (float(job.tensor_parallel) if gpus else 0.0) if gpus_per_actor is None else gpus_per_actor
        room = _room(job.tensor_parallel, each)
        count = n_actors or (max(room, 1) if each else 1)
        if count > room:
            cores = ray.cluster_resources().get("CPU", 0.0)
            raise InputError(
                f"{count} actors with {each:g} GPUs each: the cluster has {gpus:g} GPUs and {cores:g} cores, room for "
                f"{room} of them, each on one machine with {job.tensor_parallel} cores; give fewer"
            )
        for item in _dataset(job, groups, make_worker, count, each).iter_rows():
            yield json.loads(item["record"])
    except RayError as error:
        reason = str(error).strip().split("\n")[-1].rpartition("InputError: ")[2]
        raise InputError(f"the actors cannot work: {reason}") from error
    finally:
        if started_here:
            ray.shutdown()


def _room(cores: int, gpus: float) -> int:
    """How many actors that need so much fit the machines of the cluster."""
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {"CPU": cores, **({"GPU": gpus} if gpus else {})}
    return sum(min(int(machine.get(name, 0.0) / n) for name, n in wanted.items()) for machine in machines)


def _dataset(job: BatchJob, groups: Groups, make_worker: MakeWorker, n_actors: int, gpus_per_actor: float) -> Any:
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are raised as well
    begun = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Begun).remote()
    items = [{"rows": pickle.dumps(rows)} for rows in groups]
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # a result leaves its actor at once
    with DataContext.current(context):
        return ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _Actor,
            fn_constructor_args=(make_worker, job, begun),
            batch_size=1,
            compute=ActorPoolStrategy(size=n_actors, max_tasks_in_flight_per_actor=1),
            num_cpus=job.tensor_parallel,
            num_gpus=gpus_per_actor,
            runtime_env={"env_vars": passed_on()},
        )
