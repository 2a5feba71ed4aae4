"""What `videoanchor viz` makes of a finished run, file by file: one that was finished stays, whatever happens later."""

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..atomic_write import replacing
from ..video.reader import VideoClip
from . import contact_sheet, overlay, table
from .finished_run import FinishedRun
from .frames import read_clip, source_frames, video_of
from .layout import first_frames

if TYPE_CHECKING:
    from ..commands.shared import ProgressLine


class Gallery:
    """Makes the pictures and tables of one run.

    Args:
        run: the run.
        out: folder of the files, made if missing.
        video: where the video is now; None for where the run had it.
        suffix: format of the figures, "png" or "pdf".
        timeout, strict: see `read_video`.
        progress: shows how far it is.

    Attributes:
        report: what was made: "files" (and the folder of frames), and numbers of the figures.
    """

    def __init__(
        self,
        run: FinishedRun,
        out: Path,
        video: Path | None,
        suffix: str,
        timeout: float,
        progress: "ProgressLine",
        strict: bool = False,
    ) -> None:
        self._run, self._out, self._suffix, self._progress = run, out, suffix, progress
        self._asked_video, self._timeout, self._strict = video, timeout, strict
        self.report: dict[str, Any] = {"files": []}

    @cached_property
    def _video(self) -> Path:
        return video_of(self._run, self._asked_video)

    @cached_property
    def _clip(self) -> VideoClip:
        clip = read_clip(self._run, self._video, self._progress, self._timeout, self._strict)
        for note in clip.notes:
            self._progress.say(f"{self._video}: {note}")
        return clip

    @contextmanager
    def _writing(self, name: str) -> Iterator[Path]:
        """A path to write to, that becomes `name` in the output folder when all went well."""
        final = self._out / name
        final.parent.mkdir(parents=True, exist_ok=True)
        with replacing(final) as path:
            yield path
        shown = str(self._out / Path(name).parts[0])
        if shown not in self.report["files"]:
            self.report["files"].append(shown)

    def sheet(self) -> None:
        """anchors.png or .pdf."""
        run, clip = self._run, self._clip
        title = f"{run.video_name}: {run.grid.n_tokens} visual tokens, scorer {run.record['config']['scorer']}"
        with self._writing(f"anchors.{self._suffix}") as path:
            contact_sheet.draw(path, clip, run.grid, run.scores, run.labels, title)

    def csv(self) -> None:
        """tokens.csv."""
        with self._writing("tokens.csv") as path:
            table.write(path, self._run)

    def overlay(self, *, all_frames: bool) -> None:
        """overlay_scores.mp4 and overlay_subspaces.mp4."""
        for kind in ("scores", "subspaces"):
            painter = overlay.Painter.of(self._run, kind)
            with closing(self._frames(all_frames)) as frames, self._writing(f"overlay_{kind}.mp4") as path:
                overlay.write_video(path, painter, self._counted(frames, kind), slides=not all_frames)

    def _frames(self, all_frames: bool) -> Generator[tuple[float, np.ndarray]]:
        if all_frames:
            yield from source_frames(self._run, self._video, self._progress, self._timeout, self._strict)
        else:
            yield from zip(self._run.timestamps, self._clip.frames, strict=True)

    def _counted(self, frames: Iterable[tuple[float, np.ndarray]], kind: str) -> Iterator[tuple[float, np.ndarray]]:
        for n, frame in enumerate(frames, 1):
            yield frame
            self._progress(f"overlay of {kind}", n, 0)

    def frames(self) -> None:
        """frames/NNNN_scores.png and frames/NNNN_subspaces.png, numbered as the sampled frames are."""
        from PIL import Image

        for kind in ("scores", "subspaces"):
            painter = overlay.Painter.of(self._run, kind)
            for n, (seconds, frame) in enumerate(zip(self._run.timestamps, self._clip.frames, strict=True)):
                with self._writing(f"frames/{n:04d}_{kind}.png") as path:
                    Image.fromarray(painter.paint(frame, float(seconds))).save(path)

    def from_model(self, model: str, device: str, dtype: str, *, affinity: bool, attention: bool) -> None:
        """affinity and attention, as figure and CSV each, by one prefill of the run's prompt."""
        from .. import pipeline
        from . import affinity as step_affinity
        from . import attention_share, prefill

        run, clip, progress = self._run, self._clip, self._progress
        loaded, processor = pipeline.load(model, device, dtype)
        found = prefill.prefill(loaded, processor, clip, run, with_shares=attention)
        if found.shares is not None:
            with self._writing(f"attention.{self._suffix}") as path:
                attention_share.draw(path, found.shares, run.video_name)
            with self._writing("attention.csv") as path:
                attention_share.write(path, found.shares)
            layers = found.shares.layers
            self.report["attention"] = {
                "layers": len(layers),
                "queries": found.shares.n_queries,
                "share_before_gate": float(np.mean([one.ungated for one in layers])),
                "share_after_gate": float(np.mean([one.gated for one in layers])),
            }
        if affinity:
            solution = prefill.coefficients(found, progress)
            result = step_affinity.frame_affinity(solution.indices, solution.values, run.grid)
            seconds = run.timestamps[first_frames(run.grid, len(run.timestamps))]
            with self._writing(f"affinity.{self._suffix}") as path:
                step_affinity.draw(path, result, seconds, run.video_name)
            with self._writing("affinity.csv") as path:
                step_affinity.write(path, result, seconds)
            self.report["affinity"] = {"between_steps": result.between, "outside_grid": result.outside}
            difference = prefill.difference_to_recorded(solution, run)
            if difference is not None:
                self.report["affinity"]["largest_difference_to_recorded_scores"] = difference
                if difference > 0.01:
                    progress.say(
                        f"the scores computed again differ by up to {difference:.2g} from the run's: the picture is of "
                        f"this model, dtype and version, not quite of the run"
                    )
