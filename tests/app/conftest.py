"""What several files of tests look at is made once."""

from batch_runs import finished, job
from cli_runs import demo
from eval_runs import clips, n_scored
from several_videos import loaded_several, several
from viz_runs import gallery, viz_run

__all__ = ["clips", "demo", "finished", "gallery", "job", "loaded_several", "n_scored", "several", "viz_run"]
