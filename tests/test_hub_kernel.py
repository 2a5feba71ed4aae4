"""kernels/ as a kernel of the Hugging Face Hub: laid out, loaded by the `kernels` library, beside the package."""

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import videoanchor_triton as va

kernels = pytest.importorskip("kernels", minversion="0.17")
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "hub_kernel.py"
spec = importlib.util.spec_from_file_location("hub_kernel", TOOL)
assert spec
assert spec.loader
hub_kernel: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hub_kernel)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "project"
    hub_kernel.main(["--out", str(out), "--repo-id", "someone/gated-attention"])
    return out


@pytest.fixture(scope="module")
def loaded(project: Path) -> ModuleType:
    return kernels.get_local_kernel(project)


def problem(device: torch.device) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 5, 16, generator=generator).to(device) for heads in (4, 2, 2))
    gamma_k, gamma_v = (torch.rand(1, 5, generator=generator).to(device) for _ in range(2))
    return (q, k, v), {"gamma_k": gamma_k, "gamma_v": gamma_v, "backend": "triton"}


def test_every_public_function_of_the_kernels_is_there(loaded: ModuleType) -> None:
    theirs = {name for name in va.__all__ if getattr(va, name).__module__.startswith("videoanchor_triton.kernels.")}
    assert set(loaded.__all__) == set(hub_kernel.public_names()) >= theirs
    assert all(getattr(loaded, name) is not getattr(va, name) for name in theirs)


def test_loaded_kernels_compute_what_the_package_does(loaded: ModuleType, device: torch.device) -> None:
    tensors, options = problem(device)
    for query in (tensors[0], tensors[0][:, :, -1:]):
        given = (query, *tensors[1:])
        assert torch.equal(loaded.anchored_attention(*given, **options), va.anchored_attention(*given, **options))


def test_gradients_pass_through_loaded_kernels(loaded: ModuleType, device: torch.device) -> None:
    tensors, options = problem(device)
    gradients = []
    for module in (loaded, va):
        inputs = [x.clone().requires_grad_() for x in tensors]
        module.anchored_attention(*inputs, **options).sum().backward()
        gradients.append([x.grad for x in inputs])
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


def test_versions_have_operators_of_their_own(loaded: ModuleType, device: torch.device, tmp_path: Path) -> None:
    """The package and two builds in one process: each call reaches the operators of its own build."""
    hub_kernel.lay_out(tmp_path / "other", "someone/other-attention")
    other = kernels.get_local_kernel(tmp_path / "other")
    tensors, options = problem(device)
    names = set()
    for module in (va, loaded, other):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            module.anchored_attention(*tensors, **options)
        called = {event.key for event in seen.key_averages() if event.key.endswith("::anchored_attention")}
        assert len(called) == 1
        names |= called
    assert names == {f"{x}::anchored_attention" for x in ("videoanchor", loaded.__name__, other.__name__)}


def test_builds_are_what_the_metadata_says(project: Path) -> None:
    assert {str(x).rpartition(".")[2].lower() for x in Build.open(project).general.backends} == set(hub_kernel.BACKENDS)
    ids = set()
    for backend in hub_kernel.BACKENDS:
        folder = project / "build" / f"torch-{backend}"
        metadata = Metadata.read_from_file(folder / "metadata.json")
        assert metadata.digest
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder))
        assert metadata.id.isidentifier()
        ids.add(metadata.id)
    assert len(ids) == len(hub_kernel.BACKENDS)


def test_files_import_nothing_but_torch_and_triton(project: Path) -> None:
    for path in (project / "torch-ext" / "gated_attention").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"videoanchor_triton as|videoanchor::", text), path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                tops = {alias.name.split(".")[0] for alias in node.names}
                assert tops <= {"torch", "triton"} | set(sys.stdlib_module_names), path.name
            elif isinstance(node, ast.ImportFrom):
                top = (node.module or "").split(".")[0]
                assert node.level == 1 or top in {"torch", "triton"} | set(sys.stdlib_module_names), path.name


def test_older_loaders_find_the_same_functions(project: Path, loaded: ModuleType) -> None:
    backend = "cuda" if torch.cuda.is_available() else "cpu"
    place = project / "build" / f"torch-{backend}" / "gated_attention" / "__init__.py"
    older = importlib.util.spec_from_file_location("gated_attention", place)
    assert older
    assert older.loader
    module: Any = importlib.util.module_from_spec(older)
    older.loader.exec_module(module)
    assert module.anchored_attention is loaded.anchored_attention


@pytest.mark.parametrize("repo_id", ["attention", "someone/Attention", "someone/", "a/b/c"])
def test_names_that_the_hub_refuses(repo_id: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--repo-id must be OWNER/NAME"):
        hub_kernel.main(["--out", str(tmp_path / "new"), "--repo-id", repo_id])


def test_a_folder_with_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(SystemExit, match="--out must be a new or an empty folder"):
        hub_kernel.main(["--out", str(tmp_path), "--repo-id", "someone/attention"])


def test_operators_that_would_collide_are_refused() -> None:
    source = 'import torch\n\nfrom .x import y\n\n@torch.library.custom_op("videoanchor::some", mutates_args=())\n'
    assert '(add_op_namespace_prefix("some"), mutates' in hub_kernel.ported(source, "a/b")
    for wrong in (source.replace('"videoanchor::some"', 'f"videoanchor::{name}"'), source.replace("from .x", "from x")):
        with pytest.raises(ValueError, match="registered by a plain string"):
            hub_kernel.ported(wrong, "a/b")
