"""What the commands say about themselves."""

import json
from pathlib import Path

import pytest
from cli_runs import videoanchor

from videoanchor_triton.app import cli


def test_info(tmp_path: Path) -> None:
    done = videoanchor("info", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("torch", "transformers", "triton", "sdpa", "reference"):
        assert word in done.stdout
    report = json.loads(videoanchor("info", "--json", cwd=tmp_path).stdout)
    assert {"triton", "sdpa", "reference"} <= report["devices"][0]["backends"].keys()
    assert report["versions"]["torch"] in done.stdout


@pytest.mark.parametrize("command", [(), ("demo",), ("run",), ("info",)])
def test_help(command: tuple[str, ...], tmp_path: Path) -> None:
    done = videoanchor(*command, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "usage: videoanchor" in done.stdout


def test_help_of_viz(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["viz", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for name in ("RUN_DIR", "sheet", "overlay", "csv", "frames", "affinity", "attention", "example: videoanchor viz"):
        assert name in shown
