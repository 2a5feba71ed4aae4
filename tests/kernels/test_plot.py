"""The figures, from a CSV that the test makes up."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

plot: Any = importlib.import_module("benchmarks.plot")
record: Any = importlib.import_module("benchmarks.helpers.record")

ENVIRONMENT = {"device": "NVIDIA Example", "driver": "1.2", "torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0"} | {
    "python": "3.12.3", "commit": "0123456789abcdef", "dirty": "true",
}  # fmt: skip
NAMES = {
    "prefill": [name for name in plot.STYLES if "contiguous" not in name and "pages" not in name],
    "decode": [name for name in plot.STYLES if not name.startswith("ours") or "contiguous" in name or "pages" in name],
}


def made_up_rows() -> list[Any]:
    rows = [
        record.Row("ceiling", "product", "torch.matmul", status="ok", ms=1.0, rate=790.0, unit="TFLOP/s"),
        record.Row("ceiling", "copy", "copy", status="ok", ms=1.0, rate=4.3, unit="TB/s"),
    ]
    for section, ceiling, unit, lengths in (
        ("prefill", 790.0, "TFLOP/s", (2048, 8192, 32768, 131072)),
        ("decode", 4.3, "TB/s", (8192, 32768, 131072)),
    ):
        for heads in ((28, 4), (32, 8)):
            for head_dim, batch, causal in (
                [(d, 1, c) for d in (128, 64) for c in (True, False)]
                if section == "prefill"
                else [(128, b, True) for b in (1, 8, 64)]
            ):
                for i, name in enumerate(NAMES[section]):
                    for j, keys in enumerate(lengths):
                        rate = ceiling * (0.9 - 0.07 * i) * (j + 1) / (j + 2) * (0.8 if causal else 1) * head_dim / 128
                        case = f"B={batch} Hq={heads[0]} Hkv={heads[1]} D={head_dim} causal={causal} N={keys}"
                        rows.append(
                            record.Row(
                                section, case, name, batch, *heads, head_dim, causal,
                                keys if section == "prefill" else 1, keys, status="ok", error=1e-3, allowed=2e-3,
                                ms=1000 / rate, ms_p20=1.0, ms_p80=2.0, rate=rate, unit=unit, share=rate / ceiling,
                                peak_extra_mib=1.0,
                            )
                        )  # fmt: skip
    return rows


def test_both_figures_have_a_line_a_contender_and_the_ceiling(tmp_path: Path) -> None:
    record.write(tmp_path, ENVIRONMENT, made_up_rows())
    assert plot.main([str(tmp_path / "gpu_check.csv"), "--out", str(tmp_path / "figures")]) == 0
    for section in ("prefill", "decode"):
        assert (tmp_path / "figures" / f"{section}.png").read_bytes().startswith(b"\x89PNG")
    rows = plot.timed_rows(tmp_path / "gpu_check.csv")
    for section, panels in (("prefill", 4), ("decode", 3)):
        figure = plot.draw(rows, section, "28/4")
        assert len(figure.axes) == panels
        for axes in figure.axes:
            assert {line.get_label() for line in axes.lines} == {*NAMES[section], "ceiling"}
        legend = figure.legends[0].get_window_extent()
        assert all(not legend.overlaps(axes.get_tightbbox()) for axes in figure.axes)
        assert figure.bbox.contains(legend.x0, legend.y0)
        assert figure.bbox.contains(legend.x1, legend.y1)
        caption = next(text for text in figure.texts if "NVIDIA Example" in text.get_text())
        assert "triton 3.6.0" in caption.get_text()
        assert not legend.overlaps(caption.get_window_extent())
        assert figure.bbox.contains(*caption.get_window_extent().p0)
        plot.plt.close(figure)


def test_a_wrong_or_untimed_row_is_not_drawn(tmp_path: Path) -> None:
    rows = made_up_rows()
    wrong = [replace(row, status="wrong") if row.contender == "ours, ungated" else row for row in rows]
    untimed = [replace(row, ms=None, rate=None) if row.contender == "SDPA dense mask" else row for row in wrong]
    record.write(tmp_path, ENVIRONMENT, untimed)
    figure = plot.draw(plot.timed_rows(tmp_path / "gpu_check.csv"), "prefill", "32/8")
    drawn = {line.get_label() for axes in figure.axes for line in axes.lines}
    assert drawn == {*NAMES["prefill"], "ceiling"} - {"ours, ungated", "SDPA dense mask"}
    plot.plt.close(figure)


@pytest.mark.parametrize("case", ["no times", "no file", "unknown heads"])
def test_what_cannot_be_drawn_is_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "gpu_check.csv"
    arguments, expected = [str(table), "--out", str(tmp_path / "figures")], "No such file"
    if case == "no times":
        record.write(tmp_path, ENVIRONMENT, [replace(row, ms=None, rate=None) for row in made_up_rows()])
        expected = "holds no times"
    elif case == "unknown heads":
        record.write(tmp_path, ENVIRONMENT, made_up_rows())
        arguments += ["--heads", "7/1"]
        expected = "--heads must be one of 28/4, 32/8, got 7/1"
    assert plot.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert expected in said
    assert not (tmp_path / "figures").exists()
