"""The benchmark command as a user runs it, with tiny sizes."""

import json

import pytest

from hstu_xd.cli.bench import bench

# Keys of a row that checks outside the repository rely on.
KEYS = {
    "provider", "seq_len", "num_domains", "skew", "dtype", "device",
    "ms_median", "ms_p20", "ms_p80", "peak_bytes", "correct",
}  # fmt: skip
TINY = {"batch_size": 2, "heads": 2, "dqk": 4, "dv": 4, "width": 8, "layers": 1}


def run_bench(capsys: pytest.CaptureFixture[str], what: str, **options: object) -> list[dict]:
    """Rows that the command prints, as the first thing a user would do with them."""
    bench(what, as_json=True, threads=1, repeats=2, **(TINY | options))
    return json.loads(capsys.readouterr().out)
