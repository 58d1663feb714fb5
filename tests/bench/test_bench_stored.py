"""Stored rows: written whole or not at all, read back the same, drawn."""

import json
from pathlib import Path
from typing import Any

import pytest
from bench_runs import call, run_bench

from hstu_xd.bench import rows as stored
from hstu_xd.errors import InputError

ROWS: list[dict[str, Any]] = [
    {"provider": "eager", "seq_len": 12, "skew": 0.5, "correct": True, "ms_median": 1.25},
    {"provider": "1", "seq_len": 24, "absent": "no, not\nhere", "ms_median": None, "correct": None},
]


def without_unknown(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


@pytest.mark.parametrize("name", ["rows.json", "rows.csv"])
def test_rows_come_back_the_same(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    stored.write_rows(path, ROWS)
    assert without_unknown(stored.read_rows([path, path])) == 2 * without_unknown(ROWS)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_the_command_stores_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    rows = run_bench(
        capsys, "attention", seq_len=[8], num_domains=[2], provider=["eager", "sdpa"], out=path
    )
    assert json.loads(path.read_text()) == rows


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    stored.write_rows(path, ROWS)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        stored.write_rows(path, [{"provider": object()}])
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("absent.json", None),
        ("rows.txt", "[]"),
        ("broken.json", "[{"),
        ("other.json", '{"a": 1}'),
        ("other.csv", "a,b\n1,2\n"),
    ],
)
def test_what_is_no_file_of_rows_is_refused(name: str, text: str | None, tmp_path: Path) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=name):
        stored.read_rows([path])


def curve(provider: str, **changes: Any) -> list[dict]:
    row = {
        "provider": provider, "what": "attention", "device": "cpu", "dtype": "float32",
        "num_domains": 5, "skew": 0.0, "interleaving": "random", "batch_size": 2, "correct": True,
        "heads": 2,
    }  # fmt: skip
    times = {250: 1.0, 500: 2.5, 1000: 7.0}
    return [
        row | {"seq_len": n, "ms_median": ms, "peak_bytes": 1e6 * ms} | changes
        for n, ms in times.items()
    ]


def test_plot_draws_time_and_memory_over_what_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*curve("eager"), *curve("a $ngh"), *curve("late", ms_median=None, peak_bytes=None)]
    # The same sizes but for the heads, and one length alone.
    rows += curve("eager", heads=4) + curve("eager", num_domains=7)[:1]
    stored.write_rows(tmp_path / "rows.csv", rows)
    folder = tmp_path / "new" / "figures"
    call("plot", tmp_path / "rows.csv", out=folder)
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(files) == sorted(folder.iterdir())
    stem = "by-seq_len-attention-cpu-float32-random-D=5-skew=0-batch=2"
    drawn = {"ms-" + stem, "mib-" + stem, f"ms-{stem}-2", f"mib-{stem}-2"}
    across = "by-num_domains-attention-cpu-float32-random-N=250-skew=0-batch=2"
    drawn |= {"ms-" + across, "mib-" + across}
    assert {file.stem for file in files if file.suffix == ".png"} == drawn
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files if f.suffix == ".png")
    assert len((folder / "table.md").read_text().splitlines()) == len(rows) + 2


def test_plot_of_no_rows_is_refused(tmp_path: Path) -> None:
    stored.write_rows(tmp_path / "rows.json", [])
    with pytest.raises(InputError, match="there are no rows to draw"):
        call("plot", tmp_path / "rows.json", out=tmp_path)
