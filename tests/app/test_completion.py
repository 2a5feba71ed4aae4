"""Completion of the command line in a shell."""

import subprocess
from pathlib import Path

import pytest

from videoanchor_triton.app import cli, completion

_TRY = """
source "$0"
found=$(complete -p videoanchor); found=${found#*-F }
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
${found%% *} 2>/dev/null
echo "${COMPREPLY[@]}"
"""


def test_without_shtab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(completion, "find_spec", lambda _: None)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--print-completion", "bash"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "videoanchor: missing shtab: pip install 'videoanchor-triton[completion]'\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("ev",), {"eval"}),
        (("run", "--max"), {"--max-frames", "--max-pixels", "--max-new-tokens", "--max-download"}),
        (("run", "--no"), set()),
        (("eval", "--sampling", "s"), {"scene"}),
        (("run", "--video", "clip"), {"clip.mp4"}),
        (("viz", "r"), {"room"}),
    ],
)
def test_bash_completes(
    words: tuple[str, ...], expected: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("shtab", reason="shtab is missing: pip install 'videoanchor-triton[completion]'")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--print-completion", "bash"])
    assert stopped.value.code == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "clip.mp4").touch()
    (tmp_path / "room").mkdir()
    command = ["bash", "-c", _TRY, tmp_path / "script", "videoanchor", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert {*done.stdout.split()} == expected


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_get_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="shtab is missing: pip install 'videoanchor-triton[completion]'")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--print-completion", shell])
    assert stopped.value.code == 0
    script = capsys.readouterr().out
    assert "max-frames" in script
    assert "compare" in script
