"""The command as a user types it, in processes of its own."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from upstream_dlrm import CHECKOUT

from hstu_xd.errors import InputError
from hstu_xd.plugins.dlrm_v3 import HOST
from hstu_xd.plugins.dlrm_v3 import launch as launch_module
from hstu_xd.plugins.dlrm_v3.launch import check_libraries, main, world_size
from hstu_xd.plugins.host import activate
from hstu_xd.plugins.source_patches import apply_patches

ROOT = Path(__file__).parents[3]
SMALL = (
    "make_train_test_dataloaders.batch_size = 8",
    "train_loop.num_batches = 3",
    "train_eval_loop.num_train_batches = 3",
    "train_eval_loop.eval_frequency = 3",
    "train_eval_loop.num_eval_batches = 2",
    "train_eval_loop.metric_log_frequency = 1",
)


def launch(
    folder: Path, file: str, *bindings: str, mode: str = "train-eval", **variables: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hstu_xd.plugins.dlrm_v3", "--gin_config_file", file]
    for binding in (*SMALL, *bindings) if "dlrm_" in file else bindings:
        command += ["--gin_bindings", binding]
    return subprocess.run(
        [*command, "--mode", mode],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
    )


def status() -> str:
    command = ["git", "-C", str(CHECKOUT), "status", "--porcelain"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    ["dlrm_xd", *(pytest.param(name, marks=slow) for name in ("dlrm_stock", "dlrm_feature"))],
)
def test_every_recipe_trains_and_evaluates(workplace: Path, name: str) -> None:
    before = status()
    ranked = "xd_dlrm.norm_length = 128", "xd_dlrm.ranked_requests = 5"
    done = launch(workplace, f"gin/{name}.gin", *ranked)
    assert done.returncode == 0, done.stderr[-2000:]
    for metric in ("gauc", r"gauc\[switch\]", r"ne\[stay\]", "hr@10", "ndcg@10"):
        assert re.search(rf"^xd/valid/{metric}: \d", done.stdout, re.MULTILINE)
    gauc = re.search(r"metric/lifetime_gauc/next_item: ([\d.]+)", done.stdout)
    assert gauc is not None
    assert 0 < float(gauc[1]) < 1
    assert "train - Step 3 metrics" in done.stderr
    assert list((workplace / "exps" / "dlrm").glob("events.*"))
    assert status() == before


@slow
def test_a_log_that_is_cut_in_time_trains_and_evaluates(workplace: Path) -> None:
    cuts = "xd_dlrm.valid_from = 0.6", "xd_dlrm.test_from = 0.8"
    few = "make_train_test_dataloaders.batch_size = 4"
    done = launch(workplace, "gin/dlrm_xd.gin", *cuts, few)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"^xd/valid/gauc: \d", done.stdout, re.MULTILINE)


@slow
def test_requests_with_candidates_of_their_own_train_and_evaluate(
    workplace: Path, baskets: Path
) -> None:
    hard = 'xd_search.kind = "hard"', "xd_search.k = 3"
    done = launch(workplace, "gin/dlrm_xd.gin", f'dataset = "xd:{baskets / "goals"}"', *hard)
    assert done.returncode == 0, done.stderr[-2000:]
    for metric in ("auc", r"gauc\[d1\]", r"ndcg@10\[deal=true\]"):
        assert re.search(rf"^xd/valid/{metric}: \d", done.stdout, re.MULTILINE)


@slow
def test_two_processes_train_together(workplace: Path) -> None:
    done = launch(workplace, "gin/dlrm_xd.gin", mode="train", WORLD_SIZE="2")
    assert done.returncode == 0, done.stderr[-2000:]


@slow
def test_upstreams_own_gin_file_runs_unchanged(workplace: Path) -> None:
    theirs = CHECKOUT / "generative_recommenders" / "dlrm_v3" / "train" / "gin" / "debug.gin"
    (workplace / "mine.gin").write_text(
        f'import hstu_xd.plugins.dlrm_v3.activated\ninclude "{theirs}"\n'
        "xd_dlrm.hstu_attn_num_layers = 1\nxd_dlrm.table_rows = 1000\n"
        "xd_dlrm.hstu_embedding_table_dim = 8\nxd_dlrm.hstu_transducer_embedding_dim = 8\n"
        "xd_dlrm.max_seq_len = 40\ntrain_loop.output_trace = False\n"
        "xd_dlrm.interest = True\nmake_train_test_dataloaders.batch_size = 2\n"
        "train_loop.num_batches = 1\nMetricsLogger.tensorboard_log_path = 'exps'\n"
    )
    done = launch(workplace, "mine.gin", mode="train")
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_patched_trainer_takes_a_gin_file(workplace: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(CHECKOUT), str(clone)], check=True)
    apply_patches(clone)
    command = [sys.executable, str(clone / "generative_recommenders/dlrm_v3/train/train_ranker.py")]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(ROOT), str(clone)])
        return subprocess.run(
            [*command, "--mode", "train-eval", *arguments],
            cwd=workplace,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )

    bindings = [word for binding in SMALL for word in ("--gin_bindings", binding)]
    done = run("--gin_config_file", "gin/dlrm_xd.gin", *bindings)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"^xd/valid/gauc: \d", done.stdout, re.MULTILINE)
    done = run("--gin_config_file", "gone.gin")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("--gin_config_file gone.gin: no such file")
    # Without the option it is upstream's own, which knows the data sets of its list.
    assert "invalid choice: 'netflix' (choose from" in run("--dataset", "netflix").stderr


BAD = {
    "no_file": (None, ("gone.gin",), "no such file"),
    "misspelt": ("gin/dlrm_xd.gin", ("xd_dlrm.cut_point = 3",), "cut_point"),
    "no_store": ("gin/dlrm_xd.gin", ('dataset = "xd:data/nowhere"',), "no prepared store here"),
    "two_data_sets": (
        "gin/dlrm_xd.gin",
        ('make_model.dataset = "debug"',),
        "bind both to the same",
    ),
    "no_tensorboard": (
        "gin/dlrm_xd.gin",
        ('MetricsLogger.tensorboard_log_path = ""',),
        "bind MetricsLogger.tensorboard_log_path",
    ),
    "endless_evaluation": (
        "gin/dlrm_xd.gin",
        ("train_eval_loop.num_eval_batches = None",),
        "bind train_eval_loop.num_eval_batches",
    ),
    "sparse_adam": (
        "gin/dlrm_xd.gin",
        ('sparse_optimizer_factory_and_class.optimizer_name = "Adam"',),
        "fails in upstream; take 'RowWiseAdagrad' or 'SGD'",
    ),
    "not_computed": ("gin/dlrm_xd.gin", ("xd_encoder.num_blocks = 4",), "sizes are xd_dlrm.hstu_"),
    "no_such_data_set": (
        "gin/dlrm_xd.gin",
        ('dataset = "netflix"',),
        "make_model.dataset = 'netflix'; \"xd:<prepared folder>\" or one of debug,",
    ),
    "triton_without_gpu": (
        "gin/dlrm_xd.gin",
        ('xd_dlrm.kernel = "triton"',),
        'xd_dlrm.kernel = "triton" needs a GPU, and PyTorch sees none',
    ),
    "in_the_gate": (
        "gin/dlrm_xd.gin",
        ('xd_encoder.combine = "after_gate"',),
        "xd_encoder.combine = 'after_gate': the host dlrm_v3 computes domain_mask,",
    ),
    "chunks_without_norm": (
        "gin/dlrm_xd.gin",
        ("xd_dlrm.ranked_requests = 5",),
        "xd_dlrm.ranked_requests = 5 needs xd_dlrm.norm_length above max_history = 100, got 0",
    ),
    "half_a_cut": (
        "gin/dlrm_xd.gin",
        ("xd_dlrm.test_from = 0.9",),
        "xd_dlrm.valid_from = '', xd_dlrm.test_from = 0.9; a cut in time needs both",
    ),
    "of_another_trainer": (
        "gin/dlrm_xd.gin",
        ('xd_evaluate.split = "global"',),
        "xd_evaluate.split = 'global': the host dlrm_v3 reads xd_dlrm.*, xd_encoder.*, ",
    ),
    "out_of_range": ("gin/dlrm_xd.gin", ("xd_dlrm.max_history = 0",), "at least 1 is needed"),
}


@pytest.mark.parametrize(("file", "bindings", "message"), BAD.values(), ids=list(BAD))
def test_bad_input_is_one_line_and_exit_code_2(
    workplace: Path,
    file: str | None,
    bindings: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(workplace)
    command = ["--gin_config_file", file or bindings[0], "--mode", "train-eval"]
    for binding in bindings if file else ():
        command += ["--gin_bindings", binding]
    try:
        assert main(command) == 2
    finally:
        activate(HOST).revert()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m hstu_xd.plugins.dlrm_v3: ")
    assert message in line


def test_what_goes_wrong_while_it_runs_is_one_line_too(workplace: Path) -> None:
    done = launch(workplace, "gin/dlrm_xd.gin", "xd_dlrm.norm_length = 5")
    assert done.returncode == 2, done.stderr[-2000:]
    assert "python -m hstu_xd.plugins.dlrm_v3: xd_dlrm.norm_length = 5, but" in done.stderr


# What only shows when the model is built or reads a batch: (an upstream that differs, bindings of
# a gin file, message). Upstream has no binding for the layers' reach; who wants it edits that call.
REACHING = (
    "from generative_recommenders.modules import dlrm_hstu\n"
    "original = dlrm_hstu.STULayerConfig\n"
    "dlrm_hstu.STULayerConfig = lambda **given: original(**(given | {{{}}}))\n"
)
WHILE_IT_RUNS = {
    "domain_out_of_range": (
        "",
        ("xd_dlrm.num_domains = 2",),
        "feature 'uih_domain' holds domain 2, outside 0..1; correct the data or",
    ),
    "max_attn_len": (
        REACHING.format("'max_attn_len': 5"),
        (),
        "a layer has max_attn_len = 5, which counts rows of the whole history",
    ),
    "contextual_seq_len": (
        REACHING.format("'contextual_seq_len': 1"),
        (),
        "a layer has contextual_seq_len = 1, which counts rows of the whole history",
    ),
    "scripted_inference": (
        "from generative_recommenders.dlrm_v3.train import utils\n"
        "original = utils.DlrmHSTU\n"
        "utils.DlrmHSTU = lambda **given: original(**given | {'is_inference': True})\n",
        (),
        "is_inference = True: upstream's scripted inference does not know domains",
    ),
    "cached_forward": (
        "from generative_recommenders.modules.hstu_transducer import HSTUTransducer\n"
        "HSTUTransducer._hstu_compute = lambda self, *, seq_embeddings, num_targets, **others: (\n"
        "    self._stu_module.cached_forward(seq_embeddings, num_targets))\n",
        (),
        "cached_forward knows no domains; encode whole histories instead",
    ),
    "no_pair_of_domains": (
        "",
        (
            'dataset = "debug"',
            "xd_dlrm.num_domains = 2",
            "xd_dlrm.table_rows = 1000",
            "xd_dlrm.max_seq_len = 40",
            "make_train_test_dataloaders.train_split_percentage = 0.75",
            "make_train_test_dataloaders.num_blocks = 1",
        ),
        "xd_dlrm.domain_features: the batch has no feature 'uih_domain' but",
    ),
}


@slow
@pytest.mark.parametrize(
    ("upstream", "bindings", "message"), WHILE_IT_RUNS.values(), ids=list(WHILE_IT_RUNS)
)
def test_what_the_model_refuses_is_one_line_and_exit_code_2(
    workplace: Path, upstream: str, bindings: tuple[str, ...], message: str
) -> None:
    (workplace / "upstream_differs.py").write_text(upstream)
    switches = "xd_encoder.domain_mask = True", "import upstream_differs"
    done = launch(workplace, "gin/dlrm_xd.gin", *switches, *bindings, mode="train")
    assert done.returncode == 2, done.stderr[-2000:]
    *_, last = done.stderr.splitlines()
    assert last.startswith("python -m hstu_xd.plugins.dlrm_v3: ")
    assert message in last


@slow
def test_users_with_too_few_events_are_left_out_and_counted(workplace: Path) -> None:
    rows = [
        f"u{user},i{at},{at % 2},{at}"
        for user, length in enumerate((1, 2, 3, *[8] * 40))
        for at in range(length)
    ]
    (workplace / "log.csv").write_text("\n".join(["user,item,domain,time", *rows, ""]))
    prepare = ["prepare", "log.csv", "--out", "data/short", "--min-user", "1", "--min-item", "1"]
    subprocess.run([sys.executable, "-m", "hstu_xd", *prepare], cwd=workplace, check=True)
    done = launch(workplace, "gin/dlrm_xd.gin", 'dataset = "xd:data/short"')
    assert done.returncode == 0, done.stderr[-2000:]
    assert "3 of 43 users have fewer than 4 events and give no training request" in done.stderr


@slow
def test_what_goes_wrong_in_several_processes_is_one_line_too(workplace: Path) -> None:
    done = launch(workplace, "gin/dlrm_xd.gin", "xd_dlrm.norm_length = 5", WORLD_SIZE="2")
    assert done.returncode == 2, done.stderr[-2000:]
    *_, last = done.stderr.splitlines()
    assert last.startswith("python -m hstu_xd.plugins.dlrm_v3: xd_dlrm.norm_length = 5, but")


@pytest.mark.parametrize("told", ["two", "0", "-1"])
def test_a_number_of_processes_is_needed(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", told)
    with pytest.raises(InputError, match=rf"WORLD_SIZE = '{told}'; a number of processes from 1"):
        world_size()


def test_a_batch_size_that_fills_no_batch_is_refused(workplace: Path) -> None:
    done = launch(
        workplace, "gin/dlrm_xd.gin", "make_train_test_dataloaders.batch_size = 61", mode="train"
    )
    assert done.returncode == 2, done.stderr[-2000:]
    message = r"batch_size = 61, but a process has \d+ requests of training and 60 of evaluation"
    assert re.search(message, done.stderr.splitlines()[-1])


def test_an_upstream_that_was_not_verified_is_refused(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = {**HOST.sources, "modules/stu.py": {"STULayer": ("0123456789abcdef",)}}
    monkeypatch.setattr(launch_module, "HOST", dataclasses.replace(HOST, sources=sources))
    monkeypatch.chdir(workplace)
    assert main(["--gin_config_file", "gin/dlrm_xd.gin"]) == 2
    assert "differs from the versions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("library", "version", "message"),
    [
        ("torchmetrics", "1.9.0", "torchmetrics 1.9.0 does not fit: torchmetrics>=1.0.3,<1.0.4"),
        ("torchrec", "1.0.0", "torchrec 1.0.0 does not fit: torchrec>=1.1 is needed"),
        ("triton", "3.8.0", "triton 3.8.0 does not fit: triton<3.8 is needed; upstream's kernels"),
    ],
)
def test_libraries_that_do_not_fit_are_refused(
    library: str, version: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitting = {"torchrec": "1.9.2", "torchmetrics": "1.0.3", "triton": "3.7.1"}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("importlib.metadata.version", fitting.__getitem__)
    check_libraries("auto")
    fitting[library] = version
    with pytest.raises(InputError, match=re.escape(message)):
        check_libraries("auto")
    if library == "triton":
        check_libraries("pytorch")
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        check_libraries("auto")


def test_a_file_without_the_import_says_so(workplace: Path) -> None:
    (workplace / "mine.gin").write_text(
        'make_model.dataset = "xd:data/amazon"\nMetricsLogger.tensorboard_log_path = "exps"\n'
    )
    done = launch(workplace, "mine.gin", mode="train")
    assert done.returncode == 2
    assert "must import hstu_xd.plugins.dlrm_v3.activated" in done.stderr


def test_a_store_has_no_stream(workplace: Path) -> None:
    done = launch(workplace, "gin/dlrm_xd.gin", mode="streaming-train-eval")
    assert done.returncode == 2
    assert "a prepared store has no stream; take train-eval" in done.stderr


@pytest.mark.parametrize("name", ["dlrm_xd", "dlrm_stock", "dlrm_feature"])
def test_header_names_the_command_to_run(name: str) -> None:
    text = (ROOT / "gin" / f"{name}.gin").read_text()
    command = f"python -m hstu_xd.plugins.dlrm_v3 --gin_config_file gin/{name}.gin --mode"
    assert f"# {command} train-eval\n" in text
