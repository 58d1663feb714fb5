"""Files are read or named by what they hold, whatever they are called; faulty lines on request."""

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
from log_files import HEADER, contents, write_log

from hstu_xd.data.encode import IdOptions
from hstu_xd.data.prepare import prepare_logs
from hstu_xd.data.sources import content
from hstu_xd.errors import InputError

START = 1_500_000_000
ROWS = [(f"u{n % 3}", f"i{n % 8}", ("books", "films")[n % 2], START + n) for n in range(40)]


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


def as_json() -> bytes:
    return "".join(json.dumps(dict(zip(HEADER, row))) + "\n" for row in ROWS).encode()


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, bytes]:
    log = write_log(tmp_path / "expected.csv", ROWS)
    prepare_logs([str(log)], tmp_path / "expected")
    return contents(tmp_path / "expected")


PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("json_lines", [False, True])
@pytest.mark.parametrize("block", [1, 100, 10**6])
def test_compressed_logs(
    packer: str,
    json_lines: bool,
    block: int,
    tmp_path: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In blocks of any size, in one part or in two, under its own name or none."""
    monkeypatch.setattr(content.text_blocks, "__defaults__", (block,))
    data = as_json() if json_lines else write_log(tmp_path / "log.csv", ROWS).read_bytes()
    pack = PACKERS[packer]
    ending = "jsonl" if json_lines else "csv"
    files = {
        f"log.{ending}.{packer}": pack(data),
        f"log.{ending}": pack(data),
        f"two.{ending}.{packer}": pack(data[:500]) + pack(data[500:]),
    }
    for name, packed in files.items():
        (tmp_path / name).write_bytes(packed)
        prepare_logs([str(tmp_path / name)], tmp_path / "out", force=True)
        assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("name", ["000000_0", "log.snappy", "log.csv", "log.parquet.gz", "log"])
def test_parquet_of_any_name(name: str, tmp_path: Path, expected: dict[str, bytes]) -> None:
    pl.DataFrame(ROWS, schema=list(HEADER), orient="row").write_parquet(tmp_path / name)
    prepare_logs([str(tmp_path / name)], tmp_path / "out")
    assert contents(tmp_path / "out") == expected


def zipped(name: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(name, "user_id,item_id,domain,timestamp\n")
    return data.getvalue()


def tarred() -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        entry = tarfile.TarInfo("log.csv")
        archive.addfile(entry, io.BytesIO())
    return data.getvalue()


def arrow() -> bytes:
    data = io.BytesIO()
    pl.DataFrame({"a": [1]}).write_ipc(data)
    return data.getvalue()


NAMED = {
    "zip": (zipped("log.csv"), r"a zip archive \(log.csv\), not text; unpack it"),
    "workbook": (zipped("xl/workbook.xml"), "an Excel workbook, not text; export its table"),
    "tar": (tarred(), "a tar archive"),
    "tar in gzip": (gzip.compress(tarred()), "gzip file holds a tar archive"),
    "Parquet in zstd": (zstd(b"PAR1abcdPAR1"), "zstd file holds a Parquet file; unpack it first"),
    "Arrow": (arrow(), "an Arrow"),
    "pickle": (pickle.dumps({"a": 1}), "a pickle"),
    "SQLite": (b"SQLite format 3\0" + bytes(90), "an SQLite database"),
    "UTF-16": (
        "user_id\n".encode("utf-16"),
        "UTF-16 or UTF-32 text, not text; save the file as UTF-8",
    ),
    "UTF-16 without a mark": (
        "user_id,item_id\n".encode("utf-16-le"),
        "bytes that are in no text, .* save text as UTF-8, tables as CSV or Parquet",
    ),
    "zlib": (
        zlib.compress(b"user_id\n" * 9),
        "bytes that are in no text, .* pack with gzip, bzip2",
    ),
    "gzip in gzip": (gzip.compress(gzip.compress(b"a")), "gzip file holds a gzip file; unpack it"),
    "web page": (b"\n<!DOCTYPE html><html>", "a web page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid x\n", "a pointer of Git LFS"),
    "lz4": (b"\x04\x22\x4d\x18" + bytes(20), "an lz4 file"),
}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("file", ["log.csv", "log.jsonl", "log.parquet", "log"])
def test_other_files_are_named(name: str, file: str, tmp_path: Path) -> None:
    data, words = NAMED[name]
    (tmp_path / file).write_bytes(data)
    with pytest.raises(InputError, match=words):
        prepare_logs([str(tmp_path / file)], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [file]


def test_not_a_number_in_json(cli: Callable, tmp_path: Path, expected: dict[str, bytes]) -> None:
    lines = as_json().decode().splitlines()
    for word in ("NaN", "Infinity", "-Infinity"):
        lines[7] = lines[7][:-1] + f', "rating": {word}}}'
        (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
        outcome = cli("prepare", tmp_path / "log.jsonl", "--out", tmp_path / "out", "--force")
        assert outcome.code == 0
        assert "log.jsonl: read line by line" in outcome.out
        assert "Error" not in outcome.out
        assert contents(tmp_path / "out") == expected
    lines[7] = lines[7].replace(f'"timestamp": {START + 7}', '"timestamp": NaN')
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    outcome = cli("prepare", tmp_path / "log.jsonl", "--out", tmp_path / "out", "--force")
    assert outcome.code == 2
    assert f"{tmp_path / 'log.jsonl'}:8: unreadable timestamp 'nan'" in outcome.err


def test_faulty_lines_are_left_out_and_listed(
    cli: Callable, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    log = write_log(tmp_path / "log.csv", ROWS)
    lines = log.read_bytes().splitlines(keepends=True)
    faults = {
        3: b"a,b\n",
        9: b"u,i,books,noon\n",
        17: b",x,books,1500000000\n",
        30: b"u,\xff,d,1\n",
    }
    faults |= {34: b"u,i0,books,7\n", 35: b"u,i0,books,1500000000,5\n"}
    for at, text in faults.items():
        lines.insert(at, text)
    log.write_bytes(b"".join(lines))
    outcome = cli("prepare", log, "--out", tmp_path / "out")
    assert outcome.code == 2
    outcome = cli("prepare", log, "--out", tmp_path / "out", "--skip-faulty")
    assert outcome.code == 0
    assert f"{log}: 6 faulty lines left out, 40 events read" in outcome.err
    found = contents(tmp_path / "out")
    listed = list(csv.reader(io.StringIO(found.pop("faulty_lines.csv").decode())))
    assert listed[0] == ["file", "line", "problem"]
    assert [(row[0], int(row[1])) for row in listed[1:]] == [(str(log), at + 1) for at in faults]
    assert "2 fields where 4 are expected" in listed[1][2]
    assert json.loads(found["manifest.json"])["skipped_lines"] == 6
    assert {n for n in found if found[n] != expected[n]} == {"manifest.json"}
    # The list is a part of the store, which --force replaces, and goes with its reason.
    write_log(log, ROWS)
    args = ("--out", tmp_path / "out", "--skip-faulty", "--force")
    assert cli("prepare", log, *args).code == 0
    assert contents(tmp_path / "out") == expected


def test_faulty_json_lines_are_left_out(tmp_path: Path, expected: dict[str, bytes]) -> None:
    lines = as_json().splitlines(keepends=True)
    for at, text in {2: b"{\n", 5: b"[1]\n", 6: b'{"user_id": "a"}\n', 20: b'"\xff"\n'}.items():
        lines.insert(at, text)
    (tmp_path / "log.jsonl").write_bytes(b"".join(lines))
    said: list[str] = []
    prepare_logs(
        [str(tmp_path / "log.jsonl")],
        tmp_path / "out",
        ids=IdOptions(skip_faulty=True),
        warn=said.append,
    )
    assert "4 faulty lines left out, 40 events read" in said[0]
    found = contents(tmp_path / "out")
    assert {n for n in expected if found[n] != expected[n]} == {"manifest.json"}


def test_nothing_but_faulty_lines(cli: Callable, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", [("a", "b", "c", "x")] * 5)
    outcome = cli("prepare", log, "--out", tmp_path / "out", "--skip-faulty")
    assert outcome.code == 2
    assert "no events, 5 faulty lines" in outcome.err


def test_a_lone_quote_is_not_skipped(cli: Callable, tmp_path: Path) -> None:
    """What it would swallow is more than its own line."""
    log = write_log(tmp_path / "log.csv", [*ROWS[:5], ('"u', "i", "books", START), *ROWS[5:]])
    outcome = cli("prepare", log, "--out", tmp_path / "out", "--skip-faulty")
    assert outcome.code == 2
    assert f"{log}:7" in outcome.err


def peak_of(log: Path, out: Path) -> tuple[int, int, str]:
    """Exit code, peak memory in MiB and standard error of a run of its own."""
    code = (
        "import sys, resource; from hstu_xd.cli.app import run; from hstu_xd.bench.prepare import "
        "peak_bytes; code = run(['prepare', sys.argv[1], '--out', sys.argv[2]]); "
        "print('peak', peak_bytes() >> 20); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(log), str(out)], capture_output=True, text=True
    )
    return done.returncode, int(done.stdout.split("peak ")[1]), done.stderr


@pytest.mark.parametrize("pack", [gzip.compress, zstd], ids=["gzip", "zstd"])
def test_a_small_file_cannot_fill_the_memory(pack: Callable, tmp_path: Path) -> None:
    """Half a GiB of one id, packed into half a MiB, is refused at its line."""
    log = tmp_path / "log.csv.gz"
    header = b"user_id,item_id,domain,timestamp\nu,i,d,1500000000\n"
    pieces = [pack(header), *([pack(b"x" * (1 << 24))] * 32)]
    log.write_bytes(b"".join(pieces))
    code, peak, err = peak_of(log, tmp_path / "out")
    assert code == 2
    assert "log.csv.gz:3: the line is longer than 16 MiB" in err
    assert peak < 400
