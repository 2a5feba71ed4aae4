"""`python -m videoanchor_triton.integrations.lmms_eval.tasks_folder` prints the folder of this package's
tasks, for `lmms-eval --include_path`."""

from pathlib import Path

TASKS_FOLDER = Path(__file__).parent / "tasks"

if __name__ == "__main__":
    print(TASKS_FOLDER)
