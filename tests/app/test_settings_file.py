"""Settings files: what they say, what is refused, and that what is printed can be fed back."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from videoanchor_triton.app import cli
from videoanchor_triton.app.settings_file import commands_of, parse
from videoanchor_triton.integrations.errors import InputError

GATE = ("--alpha-k", "4", "--alpha-v", "1e-3", "--n-clusters", "auto", "--memory-budget", "2.5", "--keep", "0.25")
MODEL = ("--model", "a model", "--out=-x/o", "--fps", "0.5", "--fit")
GIVEN: dict[str, tuple[str, ...]] = {
    "demo": ("--out", "somewhere\x7f\n", "--json"),
    "run": (*MODEL, "--video", "é\\n.mp4", "--question", "-- \"where\"\n''' # ?", "--gate-effect", *GATE),
    "batch": ("in", *MODEL, "--question=a", "--question=-b", "--tables", "csv", "--engine-options", '{"a": 1}', *GATE),
    "eval": ("q.jsonl", *MODEL, "--ablate", "control", "--ablate", "keep=1,2", *GATE),
    "tune": ("q.jsonl", *MODEL, "--grid-k", "0,1e3", "--seed", "7"),
    "compare": ("a", "--rescore", "--", "-b"),
    "viz": ("a run", "--what", "all", "--format", "pdf", "--all-frames"),
    "convert": ("from", "--out", "to"),
    "info": ("--backbones",),
    "check": ("--device", "cpu"),
}
"""Of each command, some of everything."""


def parsed(*argv: str) -> dict[str, Any]:
    args = vars(parse(cli._parser, argv))
    return {name: value for name, value in args.items() if name not in ("config", "print_config", "settings")}


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert cli.main([*argv[:1], "--print-config", *argv[1:]]) == 0
    return capsys.readouterr().out


def test_all_commands_are_tried() -> None:
    assert GIVEN.keys() == commands_of(cli._parser()).keys()


@pytest.mark.parametrize("command", GIVEN)
def test_printed_settings_can_be_fed_back(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = (command, *GIVEN[command])
    file = tmp_path / "settings.toml"
    file.write_text(printed(capsys, *argv), encoding="utf-8")
    again = (command, "--config", str(file))
    assert parsed(*again) == parsed(*argv)
    assert printed(capsys, *again) == file.read_text(encoding="utf-8")


def test_printed_settings_name_what_is_not_set(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "run").splitlines()
    assert {"# video =", "# fps =", "max-frames = 32", 'sampling = "uniform"', "fit = false"} <= {*lines}


def test_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(
        'input = "a"\nmodel = "m"\nout = "o"\nmax-frames = 16\nfit = true\nstrict = true\n'
        'question = ["first", "second"]\ntables = ["csv"]\nalpha-k = 2\nn-clusters = 8\nkeep = 0.5\n'
    )
    alone = parsed("batch", "--config", str(file))
    expected = {"max_frames": 16, "fit": True, "question": ["first", "second"], "tables": ["csv"], "n_clusters": 8}
    assert alone | expected | {"input": Path("a"), "alpha_k": 2.0, "keep": 0.5} == alone
    line = ("--max-frames", "4", "--no-fit", "--question", "third", "--tables", "parquet")
    for argv in (("b", *line, "--config", str(file)), ("--config", str(file), *line, "--", "b")):
        won = parsed("batch", *argv)
        changed = {"max_frames": 4, "fit": False, "question": ["third"], "tables": ["parquet"], "input": Path("b")}
        assert won == alone | changed


def test_values_with_commas_may_be_lists(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('questions = "q"\nmodel = "m"\nout = "o"\nalpha-k = [2, 4.5]\nalpha-v = "0,1"\n')
    found = parsed("eval", "--config", str(file))
    assert (found["alpha_k"], found["alpha_v"]) == ([2.0, 4.5], [0.0, 1.0])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_frames = 4", "videoanchor run has no setting 'max_frames': did you mean 'max-frames'?"),
        ("alpha = 4", "did you mean 'alpha-"),
        ("nonsense = 4", "no setting 'nonsense': --print-config shows those there are"),
        ("config = 'x'", "no setting 'config'"),
        ("no-fit = true", "no setting 'no-fit'"),
        ("max-frames = 2.5", "argument --max-frames: invalid int value: '2.5'"),
        ("max-frames = true", "max-frames: expected text or a number, got True"),
        ("sampling = 'all'", "argument --sampling: invalid choice: 'all'"),
        ("fit = 1", "fit: expected true or false, got 1"),
        ("fps = [1]", "fps: expected text or a number, got [1]"),
        ("[run]\nfps = 1", "no setting 'run'"),
        ("out = 2026-01-01", "out: expected text or a number"),
        ("fps = ", "cannot be read as TOML"),
        ("fps = 1\nfps = 2", "cannot be read as TOML"),
        ("\0", "cannot be read as TOML"),
    ],
)
def test_wrong_files_are_refused_in_one_line(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(text)
    assert cli.main(["run", "--config", str(file), "--max-frames", "4", "--fps", "1", "--sampling", "scene"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"videoanchor: --config {file}: ")
    assert said in error
    assert error.count("\n") == 1


def test_a_list_is_a_list(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('question = "one"')
    with pytest.raises(InputError, match="question: expected a list, got 'one'"):
        parsed("batch", "--config", str(file))


def test_missing_files_and_missing_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--config", str(tmp_path / "none.toml")]) == 2
    assert "none.toml" in capsys.readouterr().err
    (tmp_path / "some.toml").write_text('model = "m"\nout = "o"\n')
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", "--config", str(tmp_path / "some.toml")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("the following arguments are required: --video, --question\n")


def test_what_toml_cannot_hold_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json", "--print-config"]) == 0
    assert cli.main(["viz", "\udcff", "--print-config"]) == 2
    assert "TOML is UTF-8" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"videoanchor-triton {version('videoanchor-triton')}\n"


def test_arguments_may_stand_between_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ("compare", "a", "--rescore", "b")
    assert (parsed(*line)["a"], parsed(*line)["b"]) == (Path("a"), Path("b"))
    assert 'b = "b"' in printed(capsys, *line)
    (tmp_path / "some.toml").write_text('a = "x"\nb = "y"\n')
    assert parsed(*line, "--config", str(tmp_path / "some.toml")) == parsed(*line)
    first = parsed("compare", "--config", str(tmp_path / "some.toml"), "c")
    assert (first["a"], first["b"]) == (Path("c"), Path("y"))


@pytest.mark.parametrize("option", ["--help", "--sampling=no"])
def test_usage_says_what_is_required(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run", option])
    done = capsys.readouterr()
    assert "[-h] --model NAME_OR_PATH [" in done.out + done.err
