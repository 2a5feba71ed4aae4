"""What several files of tests look at is made once."""

from batch_runs import finished, job
from cli_runs import demo
from eval_runs import clips, n_scored

__all__ = ["clips", "demo", "finished", "job", "n_scored"]
