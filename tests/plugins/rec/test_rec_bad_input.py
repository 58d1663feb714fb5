"""Bad input: one clear line, exit code 2, nothing written."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from hstu_xd.errors import InputError
from hstu_xd.plugins.rec.launch import parse

STANDIN = Path(__file__).parent / "standin"
FILES = ("--config_file", "overall/ID.yaml", "IDNet/hstu.yaml", "xd.yaml")


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A copy of the stand-in, to see what a run writes."""
    ignored = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(STANDIN, tmp_path / "code", ignore=ignored))


def refused(done: Any, code: Path) -> str:
    lines = [line for line in done.stderr.splitlines() if line.startswith("python -m")]
    assert done.returncode == 2, done.stderr[-2000:]
    assert len(lines) == 1
    assert "Traceback" not in done.stderr
    files = {p.relative_to(code) for p in code.rglob("*") if "__pycache__" not in p.parts}
    assert files == {
        p.relative_to(STANDIN) for p in STANDIN.rglob("*") if "__pycache__" not in p.parts
    }
    return lines[0]


def test_wrong_folder(launch: Any, tmp_path: Path) -> None:
    done = launch(tmp_path, *FILES)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"python -m hstu_xd.plugins.rec: {tmp_path}: no run.py, REC/data/utils.py, "
        "REC/trainer/trainer.py here; run it from the code/ folder of a checkout of bytedance/HLLM "
        "or facebookresearch/PerSRec"
    ]
    assert list(tmp_path.iterdir()) == []


def test_unknown_model(launch: Any, code: Path) -> None:
    line = refused(launch(code, *FILES, "--model", "HSTUXD"), code)
    ours = "HSTU_XD, HLLM_XD, PersonalizedHSTU_XD, PersonalizedHLLM_XD"
    theirs = "HLLM, HSTU, PersonalizedHLLM, PersonalizedHSTU"
    assert f"model: 'HSTUXD' is unknown; known: {ours}, {theirs}; " in line
    assert line.endswith("did you mean HSTU_XD?")


def test_missing_item(launch: Any, code: Path, work: Path) -> None:
    lines = (work / "data" / "synth.csv").read_text(encoding="utf-8").splitlines()
    items = list(dict.fromkeys(line.split(",")[0] for line in lines[1:]))
    domains = code.parent / "domains.csv"
    rows = [f"{item},{'ab'[i % 2]}" for i, item in enumerate(items) if i not in (3, 7)]
    domains.write_text("\n".join(["item,domain", *rows]), encoding="utf-8")
    line = refused(
        launch(code, *FILES, "--item_domain_path", domains, "--data_path", work / "data",
               "--dataset", "synth", "--hstu_embedding_size", 32, "--item_embedding_size", 32),
        code,
    )  # fmt: skip
    assert f"2 of the log's {len(items)} items are missing, first {items[3]!r}" in line


def test_one_number_of_places(launch: Any, code: Path, work: Path) -> None:
    keys = ["--item_domain_path", work / "store", "--data_path", work / "data"]
    done = launch(code, *FILES, *keys, "--dataset", "synth", "--topk", 10)
    assert "topk: 10; a list is needed, topk: [10] in a yaml file" in refused(done, code)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"user_pretrain_dir": "{work}/user_llm", "xd_full_attention_layers": '["7"]'},
            "the keys of HLLM_XD: full_attention_layers names layer 7; the layers are 0 to 1",
        ),
        ({"user_pretrain_dir": "{work}/store"}, "no config.json here; give the folder of a pretra"),
        ({"xd_warm_start": "none.pth"}, "xd_warm_start: none.pth: no such file"),
        ({"item_domain_path": "none"}, "xd_domain_mask needs to know every item's domain"),
    ],
)
def test_faulty_hllm(launch: Any, code: Path, work: Path, keys: dict[str, str], said: str) -> None:
    given = {"item_domain_path": str(work / "store"), **keys}
    pairs = [
        x for k, value in given.items() for x in (f"--{k}", value.replace("{work}", str(work)))
    ]
    files = ("--config_file", "overall/LLM_ddp.yaml", "HLLM/HLLM.yaml", "xd_hllm.yaml")
    assert said in refused(launch(code, *files, *pairs), code)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ([], "number_of_user_tokens: None; PerSRec's personalised models need a whole number"),
        (["--number_of_user_tokens", 4, "--pretrain_item_num", 5, "--insert_method", 0],
         "insert_method: 0; leave it out"),
    ],
)  # fmt: skip
def test_faulty_user_tokens(
    launch: Any, code: Path, work: Path, keys: list[Any], said: str
) -> None:
    pairs = ["--model", "PersonalizedHSTU_XD", "--item_domain_path", work / "store", *keys]
    assert said in refused(launch(code, *FILES, *pairs), code)


def test_a_codebase_without_the_personalised_models(launch: Any, code: Path, work: Path) -> None:
    file = code / "REC" / "model" / "IDNet" / "hstu.py"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.partition("\n\nclass Personalized")[0] + "\n", encoding="utf-8")
    done = launch(code, *FILES, "--model", "PersonalizedHSTU_XD")
    assert (
        "model: 'PersonalizedHSTU_XD' extends PersonalizedHSTU, which this codebase does not have; "
        "facebookresearch/PerSRec does"
    ) in refused(done, code)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["overall/ID.yaml", "xd.yaml"], "hstu_embedding_size: None; a whole number from 1 on is"),
        (["overall/ID.yaml", "IDNet/hstu.yaml", "{few}"], "n_heads: 'four'; a whole number from 1"),
        (["overall/ID.yaml", "IDNet/hstu.yaml", "{rate}"], "hidden_dropout_prob: 'high'; a number"),
        (["overall/LLM_ddp.yaml", "xd_hllm.yaml"], "user_pretrain_dir: None; give the folder or"),
        (["overall/ID.yaml", "xd.yaml", "{binary}"], "cannot make a configuration of overall/ID"),
    ],
)
def test_files_of_theirs_are_missing_or_faulty(
    launch: Any, code: Path, work: Path, files: list[str], said: str
) -> None:
    texts = {"few": b"xd_tape: True\nn_heads: four\nmodel: HSTU_XD\n", "binary": b"\xff\xfe"}
    texts["rate"] = b"xd_tape: True\nhidden_dropout_prob: high\nmodel: HSTU_XD\n"
    for name, text in texts.items():
        (code.parent / f"{name}.yaml").write_bytes(text)
    paths = {name: str(code.parent / f"{name}.yaml") for name in texts}
    given = [file.format(**paths) for file in files]
    done = launch(code, "--config_file", *given, "--item_domain_path", work / "store")
    assert said in refused(done, code)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no --config_file"),
        (["--config_file", "nowhere.yaml"], "--config_file nowhere.yaml: no such file"),
        (["--config_file", "xd.yaml", "--model"], "--model: a value is missing"),
        (["--config_file", "xd.yaml", "--model=HSTU"], "not --key=value"),
        (["--config_file", "xd.yaml", "--seed", "1", "HSTU"], "'HSTU': options are pairs"),
    ],
)
def test_faulty_command_line(arguments: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse(arguments)


def test_own_yaml_files_are_found_by_name() -> None:
    files, extras = parse(["--config_file", "xd.yaml", "--model", "HSTU_XD"])
    assert Path(files[0]).name == "xd.yaml"
    assert Path(files[0]).is_file()
    assert extras == ["--model", "HSTU_XD"]
