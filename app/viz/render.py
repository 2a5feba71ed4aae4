"""What `videoanchor viz` makes of a finished run, file by file: one that was finished stays, whatever happens later."""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..atomic_write import replacing
from ..text import asked
from ..video.names import Video
from ..video.reader import Progress, VideoClip, add_sound, frames_of
from ..video.views import is_views
from . import contact_sheet, groups, montage, overlay, table
from .finished_run import FinishedRun, read_clip, source_frames, videos_of
from .overlay import Painter
from .run_page import FromModel, run_page


class Gallery:
    """Makes the pictures and tables of one run.

    Args:
        run: the run.
        out: folder of the files, made if missing.
        videos: where the run's videos are now; None for where it had them.
        suffix: format of the figures, "png" or "pdf".
        progress, timeout, strict: see `read_video`.
        say: called with what the user should know.

    Attributes:
        report: what was made: "files" (and the folder of frames), and numbers of the figures.
    """

    def __init__(
        self,
        run: FinishedRun,
        out: Path,
        videos: Sequence[Video] | None,
        suffix: str,
        progress: Progress,
        say: Callable[[str], None],
        *,
        timeout: float,
        strict: bool,
        max_download: int,
    ) -> None:
        self._run, self._out, self._asked_videos, self._suffix = run, out, videos, suffix
        self._progress, self._say, self._max_download = progress, say, max_download
        self._reading = {"timeout": timeout, "strict": strict, "progress": progress}
        self.report: dict[str, Any] = {"files": []}
        self._said = set[str]()

    @cached_property
    def _videos(self) -> list[Path]:
        return videos_of(self._run, self._asked_videos, self._max_download, self._progress)

    @cached_property
    def _clips(self) -> list[VideoClip]:
        clips = [read_clip(self._run, video, n, **self._reading) for n, video in enumerate(self._videos)]
        for video, clip in zip(self._videos, clips, strict=True):
            for note in clip.notes:
                self._say(f"{video}: {note}")
        return clips

    @cached_property
    def _frames(self) -> list[np.ndarray]:
        return frames_of(self._clips)

    def _write(self, name: str, write: Callable[..., None], *args: Any, **options: Any) -> None:
        """Calls `write` with a path that becomes `name` in the output folder when all went well."""
        final = self._out / name
        final.parent.mkdir(parents=True, exist_ok=True)
        with replacing(final) as path:
            write(path, *args, **options)
        shown = str(self._out / Path(name).parts[0])
        if shown not in self.report["files"]:
            self.report["files"].append(shown)

    def sheet(self) -> None:
        """anchors.png or .pdf, and groups.png or .pdf of a run with merged tokens."""
        run = self._run
        self._write(f"anchors.{self._suffix}", contact_sheet.draw, self._frames, run)
        if run.groups is not None:
            self._write(f"groups.{self._suffix}", groups.draw, self._frames, run)

    def montage(self) -> None:
        """subspaces.png or .pdf."""
        self._write(f"subspaces.{self._suffix}", montage.draw, self._frames, self._run)

    def csv(self) -> None:
        """tokens.csv."""
        self._write("tokens.csv", table.write, table.token_rows(self._run))

    def page(self, found: FromModel | None = None) -> None:
        """viz.html, with what the run's model told where it was asked."""
        text = run_page(self._run, self._frames, self._videos, found)
        self._write("viz.html", lambda path: path.write_text(text, encoding="utf-8"))

    def overlay(self, *, all_frames: bool) -> None:
        """overlay_scores.mp4 and overlay_subspaces.mp4, of the sampled frames or of all of one video with its sound."""
        for kind in overlay.KINDS:
            write = self._whole_video if all_frames else self._slides
            self._write(f"overlay_{kind}.mp4", write, Painter(self._run, kind), kind)

    def _slides(self, path: Path, painter: Painter, kind: str) -> None:
        frames = zip(self._run.timestamps.tolist(), self._frames, strict=True)
        size = overlay.largest(painter, self._frames)
        overlay.write_video(path, painter, self._counted(frames, kind), slides=True, size=size)

    def _whole_video(self, path: Path, painter: Painter, kind: str) -> None:
        with closing(source_frames(self._run, self._videos[0], **self._reading)) as frames:
            start = overlay.write_video(path, painter, self._counted(frames, kind), slides=False)
        (video,) = self._videos
        if video.is_file() and not is_views(video):
            options = {"timeout": self._reading["timeout"], "progress": self._progress}
            note = add_sound(path, video, start, **options)
            if note is not None and note not in self._said:
                self._said.add(note)
                self._say(f"{video}: {note}")

    def frames(self) -> None:
        """frames/NNNN_scores.png and frames/NNNN_subspaces.png, numbered as the sampled frames are."""
        for kind in overlay.KINDS:
            painter = Painter(self._run, kind)
            for n, frame in enumerate(self._frames):
                picture = Image.fromarray(painter.paint_sampled(n, frame))
                self._write(f"frames/{n:04d}_{kind}.png", picture.save)

    def _counted(self, frames: Iterable[Any], kind: str) -> Generator[Any]:
        for n, frame in enumerate(frames, 1):
            yield frame
            self._progress(f"overlay of {kind}", n, 0)

    def from_model(
        self, model: str, device: str, dtype: str, *, affinity: bool, attention: bool, ungated: bool
    ) -> FromModel:
        """affinity and attention, as figure and CSV each, by one prefill of the run's prompt.

        Args:
            ungated: ask for the answer without the gate, too.

        Returns:
            what was found, for `page`.
        """
        from ...anchor.config import UNGATED
        from .. import pipeline
        from ..token_sampling import TokenSampling
        from . import affinity as step_affinity
        from . import attention_share, prefill

        run, clips = self._run, self._clips
        loaded, processor = pipeline.load(model, device, dtype)
        found = prefill.prefill(loaded, processor, clips, run, with_shares=attention)
        if found.shares is not None:
            self._write(f"attention.{self._suffix}", attention_share.draw, found.shares, run.caption)
            self._write("attention.csv", table.write, attention_share.rows(found.shares))
            self.report["attention"] = attention_share.summary(found.shares)
        solution = None
        if affinity:
            solution = prefill.coefficients(found, run, self._progress)
            result = step_affinity.frame_affinity(solution.indices, solution.values, run.grid)
            seconds = run.timestamps[run.first_frames]
            moments = run.moments(run.first_frames, 0 if seconds.max() >= 100 else 2)
            self._write(f"affinity.{self._suffix}", step_affinity.draw, result, moments, run.caption)
            self._write("affinity.csv", table.write, step_affinity.rows(result, seconds))
            self.report["affinity"] = {"between_steps": result.between, "outside_grid": result.outside}
            difference = prefill.difference_to_recorded(solution, run)
            if difference is not None:
                self.report["affinity"]["largest_difference_to_recorded_scores"] = difference
                if difference > 0.01:
                    self._say(
                        f"the scores computed again differ by up to {difference:.2g} from the run's: the picture is of "
                        f"this model, dtype and version, not quite of the run"
                    )
        answer = None
        if ungated:
            n_most = run.record["budget"]["max_new_tokens"]
            question = asked(run.record["question"], run.record.get("system"))
            drawn = TokenSampling(**run.record["drawn"]) if run.record.get("drawn") else None
            options = {"max_new_tokens": n_most, "drawn": drawn}
            answer = pipeline.answer(loaded, processor, clips, question, UNGATED, **options).text
        return FromModel(solution, found.shares, answer)
