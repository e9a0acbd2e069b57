"""Plots and the README's table: made from CSV only, and those in the repository still fit their CSV."""

from __future__ import annotations

from pathlib import Path

import pytest
from cutedsl_kernels.bench import plot
from cutedsl_kernels.bench.records import COLUMNS, CsvWriter, read_rows
from cutedsl_kernels.bench.select import Case, by_gpu, measured

from cutedsl_kernels import KNOWN_MODELS, UserError

pytestmark = pytest.mark.cpu
ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "bench" / "results").glob("layer*.csv"))
MODEL = "qwen3.5-35b-a3b"


def row(num_tokens: int, sparsity: float, us: float, **changes: str) -> dict[str, str]:
    shape = KNOWN_MODELS[MODEL].shape
    return {
        **dict.fromkeys(COLUMNS, ""),
        "date": "2026-01-02T03:04:05Z",
        "gpu": "made up",
        "model": MODEL,
        "experts": str(shape.num_experts),
        "hidden": str(shape.hidden_size),
        "intermediate": str(shape.intermediate_size),
        "top_k": str(shape.top_k),
        "num_tokens": str(num_tokens),
        "routing": "uniform",
        "sparsity_target": f"{sparsity:g}",
        "pair_skip_target": "0",
        "plan": "fused",
        "us": f"{us}",
        "gbps": "2000",
        "copy_share": "0.5",
        "baseline": "vllm-triton",
        "baseline_us": "100.0",
        "router_weighted": "0",
        "choice": "auto",
        **changes,
    }


@pytest.fixture
def csv_file(tmp_path: Path) -> Path:
    path = tmp_path / "made-up.csv"
    writer = CsvWriter(path)
    for tokens in (1, 8, 64):
        for sparsity in (0.0, 0.5, 0.845):
            writer.write(row(tokens, sparsity, 120 - 80 * sparsity))
    for tokens in (1, 1024):
        routed = {"router_weighted": "1", "pair_skip_target": "0.35"}
        writer.write(row(tokens, 0.9, 40, **routed))
    writer.write(row(1, 0.0, 100, choice="baseline", plan="vllm-triton"))
    writer.close()
    return path


def test_which_row_counts() -> None:
    rows = [
        row(1, 0.5, 50, choice="asked", plan="fused"),
        row(1, 0.5, 40, choice="asked", plan="staged"),
        row(8, 0.5, 30, choice="asked"),
        row(8, 0.5, 60, choice="auto", date="2026-01-01"),
        row(8, 0.5, 61, choice="auto", date="2026-01-02"),
        row(8, 0.5, 1, iou_target="0.2"),
        row(8, 0.5, 1, routing="zipf"),
        row(8, 0.5, 1, choice="baseline"),
        row(8, 0.5, 1, baseline_us=""),
    ]
    (points,) = measured(rows, MODEL).values()
    assert [(one.num_tokens, one.us) for one in points] == [(1, 40.0), (8, 61.0)]
    assert points[0].ratio == 2.5
    assert measured(rows, "another") == {}


def test_byte_cap_is_the_one_of_the_method() -> None:
    """Caps of the method's table: 2.29 at one token and 84.5 %, 1.54 at 128; 3.6 at one token with pairs skipped."""
    ((first, second),) = measured([row(1, 0.845, 1), row(128, 0.845, 1)], MODEL).values()
    assert first.byte_cap == pytest.approx(2.29, abs=0.01)
    assert second.byte_cap == pytest.approx(1.54, abs=0.01)
    routed = row(1, 0.9, 1, router_weighted="1", pair_skip_target="0.35")
    ((one,),) = measured([routed], MODEL).values()
    assert one.byte_cap == pytest.approx(3.53, abs=0.1)


def test_all_plots_are_made(csv_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "plots"
    assert plot.main([str(csv_file), "--out", str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {f"{MODEL}-{kind}.{end}" for kind in ("speedup", "bandwidth", "time") for end in ("png", "svg")}
    cases = measured(read_rows([csv_file]), MODEL)
    assert plot.data_hash(cases) in (out / f"{MODEL}-speedup.svg").read_text()
    assert all(path.stat().st_size > 10_000 for path in out.iterdir())


def test_two_gpus_never_share_a_table_or_a_plot(tmp_path: Path) -> None:
    """The GPU measured last comes first in the README, whatever file is named first."""
    rows = [
        row(1, 0.845, 50, gpu="older", date="2026-01-01"),
        row(8, 0.845, 40, gpu="older", date="2026-01-01"),
        row(1, 0.845, 25, gpu="newer", date="2026-01-02"),
    ]
    text = plot.readme_text(rows)
    newer, older = text.split(".svg)")
    assert "on newer" in newer
    assert "| 1 | 100.0 | 25.0 | **4.00x** | 50% |" in newer
    assert "on older" in older
    assert "| 1 | 100.0 | 50.0 | **2.00x** | 50% |" in older
    assert {path.name.split("-")[0] for path in plot.plot_all(rows, tmp_path)} == {"older", "newer"}


def test_other_models_share_one_table() -> None:
    """Of the GPU measured last, without the main model; what was not measured stays empty, and large batches out."""
    routed = {"router_weighted": "1", "pair_skip_target": "0.35"}
    rows = [
        row(1, 0.845, 25),
        row(1, 0.0, 100, model="another"),
        row(4, 0.85, 40, model="another"),
        row(4, 0.6, 1, model="another"),
        row(1, 0.9, 20, model="another", **routed),
        row(1024, 0.9, 1, model="another", **routed),
        row(1, 0.5, 50, gpu="older", model="a third", date="2026-01-01"),
    ]
    table = plot.models_table(rows[:-1]).splitlines()
    assert table[0].startswith("Other models on made up: ")
    assert table[2:] == [
        "| model | inactive neurons | 1 | 4 |",
        "|---|---|---:|---:|",
        "| another | 0 % | 1.00x |  |",
        "| another | 85 % |  | 2.50x |",
        "| another | 90 %, 35 % of pairs skipped | 5.00x |  |",
    ]
    assert "\n".join(table) in plot.readme_text(rows)
    assert plot.models_table(rows[:1]) == ""


def test_readme_is_rewritten_between_its_marks_only(csv_file: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{plot.TABLE_MARKS[0]}\nold\n{plot.TABLE_MARKS[1]}\nafter\n")
    for _ in range(2):  # the second time changes nothing
        assert plot.main([str(csv_file), "--readme", "--root", str(tmp_path)]) == 0
        text = readme.read_text()
        assert text.startswith(f"before\n{plot.TABLE_MARKS[0]}\nOne MoE layer of {MODEL}")
        assert text.endswith(f"\n{plot.TABLE_MARKS[1]}\nafter\n")
        assert "old" not in text
        assert "| 1 | 100.0 | 52.4 | **1.91x** | 50% | 40.0 | **2.50x** | 50% |" in text
        assert "| 1024 | 100.0 |  |  |  | 40.0 | **2.50x** | 50% |" in text
    assert (tmp_path / f"{plot.README_PLOT}.svg").exists()


def test_bad_input_is_one_line(tmp_path: Path, csv_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.csv"
    empty.write_text(",".join(COLUMNS) + "\n")
    for words, message in (
        ([str(tmp_path / "none.csv")], "cannot read"),
        ([str(empty)], "nothing to plot"),
        ([str(csv_file), "--readme", "--root", str(tmp_path / "nowhere")], "give --root"),
    ):
        assert plot.main(words) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert message in lines[0]
    with pytest.raises(UserError, match="needs the lines"):
        plot.with_table("no marks", "table")


def test_readme_and_its_plot_fit_the_committed_csv() -> None:
    readme = (ROOT / "README.md").read_text()
    begin, end = (readme.index(mark) for mark in plot.TABLE_MARKS)
    shown = readme[begin + len(plot.TABLE_MARKS[0]) : end].strip()
    if not RESULTS:
        assert shown == "", "README.md shows figures, but bench/results holds no CSV"
        return
    rows = read_rows(RESULTS)
    assert shown == plot.readme_text(rows), "run: cutedsl-kernels bench plot bench/results/layer*.csv --readme"
    _, cases = plot.readme_cases(next(iter(by_gpu(rows).values())))
    drawn = (ROOT / f"{plot.README_PLOT}.svg").read_text()
    assert plot.data_hash(cases) in drawn, "run: cutedsl-kernels bench plot bench/results/layer*.csv --readme"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_committed_rows_are_whole(path: Path) -> None:
    """Every number in the repository says on what, against what and with what error it was measured."""
    for line in read_rows([path]):
        for name in ("date", "revision", "gpu", "torch", "model", "plan", "statistic", "us", "error", "copy_gbps"):
            assert line[name], f"{name} is empty in {line}"
        assert float(line["us"]) > 0
        assert 0 <= float(line["error"]) < 0.05


def test_case_labels() -> None:
    assert Case(0.845, 0.0, False).label == "84.5 %"
    assert Case(0.9, 0.35, True).label == "90 %, 35 % of pairs skipped"
