"""What answers the questions of a batch: a model, and one video after another."""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...integrations.errors import InputError
from ..libraries import prepare_libraries
from ..video.limits import MAX_PIXELS
from ..video.names import each, notes_of, sha256s_of, shown
from .results import Record
from .rows import BatchRow
from .stopping import Failure, failure_of

if TYPE_CHECKING:  # these import torch, and the input is read before that
    from ...anchor.config import VideoAnchorConfig
    from ...anchor.timing import Progress
    from ..token_sampling import TokenSampling
    from ..video.reader import VideoClip
    from ..video_model import Answered

CONFIG_COLUMNS = (
    *("alpha_q", "alpha_k", "alpha_v", "decode", "scorer", "score", "n_clusters", "pca_rank", "random_state"),
    *("assign_labels", "tol", "keep", "group", "merge"),
)
_LATER_DEFAULTS = {"max_pixels": MAX_PIXELS, "strict": False, "keep": 1.0, "group": "ward", "merge": "counts"}
"""Options that came after the first results: at their defaults settings are those of before."""
DRAWN_COLUMNS = ("temperature", "top_p", "top_k", "seed")
VIDEO_COLUMNS = ("max_frames", "fps", "sampling", "max_pixels", "strict")


@dataclass(frozen=True)
class BatchJob:
    """What is the same for all rows of a batch.

    Args:
        model, device, dtype: see `pipeline.load`.
        config: scores and gate.
        video: how videos are sampled, the keywords of `read_video`.
        fit: take as many frames as fit, instead of failing.
        max_new_tokens: of an answer.
        score_folder, score_bytes: see `ScoreCache`.
        share_prefill: see `SharedPrefill`.
        tensor_parallel: processes among which the model is split.
        engine: what computes the answers.
        gate_effect, drawn: see `pipeline.answer`.
    """

    model: str
    device: str
    dtype: str
    config: "VideoAnchorConfig"
    video: dict[str, Any]
    fit: bool
    max_new_tokens: int
    score_folder: Path
    score_bytes: int
    share_prefill: bool = True
    tensor_parallel: int = 1
    engine: Literal["transformers", "vllm"] = "transformers"
    gate_effect: bool = False
    drawn: "TokenSampling | None" = None

    def settings(self) -> dict[str, Any]:
        """What an answer depends on, ready for JSON."""
        folder = Path(self.model)
        return {
            "model": str(folder.absolute()) if folder.is_dir() else self.model,
            "dtype": self.dtype,
            "config": {
                name: value for name, value in self.config.to_dict().items() if value != _LATER_DEFAULTS.get(name, ...)
            },
            "video": {
                name: value
                for name, value in self.video.items()
                if name not in ("timeout", "max_download") and value != _LATER_DEFAULTS.get(name, ...)
            },
            "fit": self.fit,
            "max_new_tokens": self.max_new_tokens,
            # as for video: settings of before there was a choice stay what they were
            **({} if self.engine == "transformers" else {"engine": self.engine}),
            **({"gate_effect": True} if self.gate_effect else {}),
            **({} if self.drawn is None else {"drawn": asdict(self.drawn)}),
        }

    def settings_hash(self) -> str:
        """16 hexadecimal digits of `settings`."""
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:16]

    def columns(self) -> Record:
        """What tells these settings from others in each result."""
        return setting_columns(self.settings())


def setting_columns(settings: dict[str, Any]) -> Record:
    """The columns of `BatchJob.settings`."""
    config, video = _LATER_DEFAULTS | settings["config"], _LATER_DEFAULTS | settings["video"]
    return {
        "model": settings["model"],
        "dtype": settings["dtype"],
        **{name: config.get(name) for name in CONFIG_COLUMNS},
        **{name: video.get(name) for name in VIDEO_COLUMNS},
        "fit": settings["fit"],
        "max_new_tokens": settings["max_new_tokens"],
        "engine": settings.get("engine", "transformers"),
        **{name: settings.get("drawn", {}).get(name) for name in DRAWN_COLUMNS},
    }


class BatchWorker:
    """A model that answers rows; `close` ends the processes that it is split among.

    Raises:
        InputError: the checkpoint cannot be loaded or split.
        ChildProcessError: the processes cannot be started; also from `answer`, where they have to be started again.
    """

    def __init__(self, job: BatchJob, progress: "Progress | None" = None) -> None:
        prepare_libraries()
        from ..budget import Planner
        from ..tensor_parallel import SplitModel
        from ..video_model import VideoModel

        self._job, self._progress, self._settings_hash = job, progress, job.settings_hash()
        options: dict[str, Any] = {"device": job.device, "dtype": job.dtype, "max_new_tokens": job.max_new_tokens}
        self._planner = Planner(job.model, job.config, tensor_parallel=job.tensor_parallel, **options)
        scores = job.score_folder, job.score_bytes
        about = {"config": job.config, "scores": scores, "gate_effect": job.gate_effect, "drawn": job.drawn}
        make = partial(VideoModel, model=job.model, **about, **options)
        split = job.tensor_parallel > 1
        self._model = SplitModel(make, job.tensor_parallel, job.device, progress) if split else make(progress)
        self.close = self._model.close

    def answer(self, rows: Sequence[BatchRow]) -> Iterator[Record]:
        """Results of the rows of one video, or of the same several, each as it is there.

        What goes wrong with a row becomes its result."""
        start = time.perf_counter()
        try:
            clips, too_long = self._read(rows)
        except Exception as error:
            yield from (failed(row, self._settings_hash, error) for row in rows)
            return
        decoded = time.perf_counter() - start
        for row in rows:
            if row.number in too_long:
                yield failed(row, self._settings_hash, InputError(too_long[row.number]))
                continue
            self._model.open(clips, share=self._job.share_prefill and len(rows) > 1)
            try:
                answered = self._model.answer(row.messages())
            except Exception as error:
                yield failed(row, self._settings_hash, error)
            else:
                yield self._done(row, clips, answered, decoded)
                decoded = 0.0

    def _read(self, rows: Sequence[BatchRow]) -> "tuple[list[VideoClip], dict[int, str]]":
        """The clips, and the numbers of the rows whose question does not fit beside them, with what would."""
        from ..video.reader import read_video

        def read(**options: Any) -> "list[VideoClip]":
            options = {**self._job.video, **options, "progress": self._progress}
            return [read_video(video, **options) for video in each(rows[0].video)]

        clips = read()
        too_long: dict[int, str] = {}
        for row in sorted(rows, key=lambda row: -len(row.question) - len(row.system or "")):
            question = row.messages()
            problem = self._planner.budget(clips, question).problem
            while problem is not None and self._job.fit and (n := self._planner.largest(clips, question)):
                clips = read(max_frames=n)
                problem = self._planner.budget(clips, question).problem
            if problem is None:
                break  # shorter questions fit as well
            too_long[row.number] = f"{problem}: {self._planner.advice(clips, question)}"
        return clips, too_long

    def _done(self, row: BatchRow, clips: "list[VideoClip]", answered: "Answered", decoded: float) -> Record:
        result, cached, host_memory = answered
        anchor = result.anchor
        return {
            **about(row, self._settings_hash),
            "status": "done",
            "sha256": sha256s_of(row.video),
            "answer": result.text,
            "gate_effect": None if result.gate_effect is None else asdict(result.gate_effect),
            "failure": None,
            "reason": None,
            "tokens": {
                "prompt": result.n_prompt_tokens,
                "visual": result.n_visual_tokens,
                "generated": result.n_generated_tokens,
            },
            "frames": sum(len(clip.frames) for clip in clips),
            "notes": notes_of(each(row.video), clips),
            "ssc": {
                "eigengap": anchor.eigengap,
                "in_gap": anchor.in_gap,
                "n_iter": anchor.n_iter,
                "residual": anchor.residual,
                "converged": anchor.converged,
                "cached": cached,
            },
            "seconds": {"decode_video": decoded, **result.seconds},
            "peak_memory_bytes": result.peak_memory_bytes,
            "peak_host_memory_bytes": host_memory,
            "device": result.device,
            "version": version("videoanchor-triton"),
        }


def failed(row: BatchRow, settings_hash: str, error: BaseException | str) -> Record:
    """The result of a row that could not be answered."""
    failure: Failure = "other" if isinstance(error, str) else failure_of(error)
    reason = error if isinstance(error, str) else reason_of(error)
    return {**about(row, settings_hash), "status": "failed", "answer": None, "failure": failure, "reason": reason}


def reason_of(error: BaseException) -> str:
    """What an exception says."""
    text = str(error).strip() or type(error).__name__
    return text if isinstance(error, InputError | ChildProcessError) else f"{type(error).__name__}: {text}"


def unasked(row: BatchRow, settings_hash: str) -> Record:
    """The place of a row in the tables until it has a result."""
    return {**about(row, settings_hash), "status": "unasked"}


def about(row: BatchRow, settings_hash: str) -> Record:
    """What a result says of its row."""
    return {
        "key": row.key(settings_hash),
        "video": shown(row.video),
        "fingerprint": row.fingerprint,
        "question": row.question,
        "system": row.system,
        "settings": settings_hash,
        "line": row.number,
        "copy": row.copy,
        "input": row.columns,
    }
