"""A backend of Triton named "cpu" that compiles nothing. With it on the path, and TRITON_INTERPRET=1, vLLM's CPU build
takes Triton for usable and runs its second model runner and its Triton kernels, as on a GPU, in the interpreter."""

from pathlib import Path


def install(folder: Path) -> Path:
    """Write what `importlib.metadata` finds where `folder` is on PYTHONPATH, beside the folder of this package."""
    info = folder / "interpreted_triton-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: interpreted-triton\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[triton.backends]\ncpu = interpreted_triton\n")
    (folder / "interpreted_triton").symlink_to(Path(__file__).parent, target_is_directory=True)
    return folder
