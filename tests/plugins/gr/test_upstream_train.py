"""The commands as a user types them, in processes of their own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hstu_xd.plugins.source_patches import inspect_tree

ROOT = Path(__file__).parents[3]
# As a user types it: unlike `python -m`, it has not the current folder on its path.
COMMAND = str(Path(sys.executable).parent / "hstu-xd")
SMALL = (
    "train_fn.max_sequence_length = 12",
    "train_fn.num_negatives = 16",
    "create_data_loader.num_workers = 0",
    "create_data_loader.prefetch_factor = None",
    "train_fn.eval_interval = 5",
)


def upstream_train(
    folder: Path, file: str, *bindings: str, options: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    command = [COMMAND, "upstream-train", "--gin_config_file", file]
    for binding in bindings:
        command += ["--gin_bindings", binding]
    return subprocess.run(
        [*command, *options],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def scalars(folder: Path, tag: str) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (folder / "exps").rglob("events.*")
    log = EventAccumulator(str(events))
    log.Reload()
    return [event.value for event in log.Scalars(tag)]


@pytest.mark.parametrize("name", ["amazon_xd", "amazon_hstu"])
def test_loss_goes_down_and_all_metrics_are_logged(workplace: Path, name: str) -> None:
    done = upstream_train(workplace, f"gin/{name}.gin", *SMALL, "train_fn.num_epochs = 10")
    assert done.returncode == 0, done.stderr
    losses = scalars(workplace, "losses/ar_loss")
    assert sum(losses[-3:]) < sum(losses[:3]) - 1  # 14 against 18
    for tag in ("ndcg@10", "hr@100", "mrr", "mrr/switch", "hr@10/stay", "hr@10/books"):
        assert len(scalars(workplace, f"eval_epoch/{tag}")) == 10, tag
    assert "eval @ epoch 9" in done.stdout
    assert "takes the place of get_reco_dataset, get_sequential_encoder, " in done.stdout


@pytest.mark.slow
def test_a_seed_makes_a_run_repeatable(workplace: Path) -> None:
    def losses(folder: str, *bindings: str) -> list[float]:
        place = workplace / folder
        place.mkdir()
        for name in ("gin", "data"):
            (place / name).symlink_to(workplace / name)
        done = upstream_train(
            place, "gin/amazon_xd.gin", *SMALL, "train_fn.num_epochs = 2", *bindings
        )
        assert done.returncode == 0, done.stderr
        return scalars(place, "losses/ar_loss")

    first = losses("first", "xd_upstream.seed = 5")
    assert losses("second", "xd_upstream.seed = 5") == first
    assert losses("third", "xd_upstream.seed = 6") != first


def test_two_processes_train_together(workplace: Path) -> None:
    done = upstream_train(
        workplace,
        "gin/amazon_xd.gin",
        *SMALL,
        "train_fn.num_epochs = 2",
        options=("--processes", "2"),
    )
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"rank (\d): eval @ epoch 1 .*?: (NDCG@10.*)", done.stdout)
    assert sorted(rank for rank, _ in lines) == ["0", "1"]
    assert len({metrics for _, metrics in lines}) == 1
    (checkpoint,) = (workplace / "ckpts").rglob("*ddp2*_ep1")
    assert checkpoint.is_file()


@pytest.mark.slow
def test_a_trained_hstu_continues_as_the_cross_domain_model(workplace: Path) -> None:
    def before_the_first_step(*bindings: str) -> str:
        done = upstream_train(
            workplace, "gin/amazon_hstu.gin", *SMALL, "train_fn.num_epochs = 1", *bindings
        )
        assert done.returncode == 0, done.stderr
        return re.findall(r"\(eval\): iter 0 \(epoch 0\): (NDCG@10.*)", done.stdout)[0]

    upstream_train(workplace, "gin/amazon_hstu.gin", *SMALL, "train_fn.num_epochs = 3")
    (checkpoint,) = (workplace / "ckpts").rglob("HSTU-*_ep2")
    warm = f'xd_upstream.warm_start = "{checkpoint.relative_to(workplace)}"'
    cross_domain = (
        'train_fn.main_module = "HSTU_XD"',
        "xd_encoder.tape = True",
        "xd_encoder.ddsr = True",
    )
    as_hstu = before_the_first_step(warm)
    assert before_the_first_step(warm, *cross_domain) == as_hstu
    assert before_the_first_step(*cross_domain) != as_hstu


@pytest.mark.slow
def test_a_checkpoint_is_read_on_the_test_split(workplace: Path) -> None:
    upstream_train(workplace, "gin/amazon_xd.gin", *SMALL, "train_fn.num_epochs = 2")
    (checkpoint,) = (workplace / "ckpts").rglob("HSTU_XD-*_ep1")

    def evaluate(*options: str) -> subprocess.CompletedProcess[str]:
        command = [COMMAND, "upstream-evaluate", str(checkpoint), *options]
        for binding in SMALL:
            command += ["--gin_bindings", binding]
        return subprocess.run(
            [*command, "--json"], cwd=workplace, capture_output=True, text=True, check=False
        )

    done = evaluate("--gin_config_file", "gin/amazon_xd.gin", "--split", "valid")
    assert done.returncode == 0, done.stderr
    valid = json.loads(done.stdout.splitlines()[-1])
    assert valid["mrr"] == pytest.approx(scalars(workplace, "eval_epoch/mrr")[-1])
    assert valid["hr@10/switch"] == pytest.approx(scalars(workplace, "eval_epoch/hr@10/switch")[-1])
    gone = "xd_upstream.warm_start = 'gone'"  # what the training started from is not needed
    done = evaluate("--gin_config_file", "gin/amazon_xd.gin", "--gin_bindings", gone)
    assert json.loads(done.stdout.splitlines()[-1])["mrr"] != valid["mrr"]
    done = evaluate("--gin_config_file", "gin/amazon_hstu.gin")
    assert done.returncode == 2
    assert "not a checkpoint of the model that gin/amazon_hstu.gin describes" in done.stderr


def test_checkpoint_holds_upstreams_names_and_ours(workplace: Path) -> None:
    upstream_train(workplace, "gin/amazon_xd.gin", *SMALL, "train_fn.num_epochs = 1")
    (file,) = (workplace / "ckpts").rglob("HSTU_XD-*_ep0")
    names = set(torch.load(file, weights_only=True)["model_state_dict"])
    assert "module._hstu._attention_layers.0._uvqk" in names
    assert "module._tape._scale" in names
    assert not any("catalog" in name for name in names)


@pytest.mark.parametrize(
    ("text", "bindings", "message"),
    [
        ('train_fn.dataset_name = "xd:data/amazon"', (), "must import hstu_xd.plugins"),
        ("xd_encoder.tape = True", (), "must import hstu_xd.plugins"),
        (None, ('train_fn.dataset_name = "xd:data/nowhere"',), "no prepared store here"),
        (None, ('train_fn.main_module = "HSTU_DX"',), "did you mean 'HSTU_XD'"),
        (None, ("xd_encoder.tappe = True",), "tappe"),
    ],
    ids=["no_import", "no_import_xd", "no_folder", "misspelt_module", "misspelt_switch"],
)
def test_bad_input_is_one_line_and_exit_code_2(
    workplace: Path, text: str | None, bindings: tuple[str, ...], message: str
) -> None:
    file = "gin/amazon_xd.gin"
    if text is not None:
        (workplace / "mine.gin").write_text(text + "\n")
        file = "mine.gin"
    done = upstream_train(workplace, file, *bindings)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("hstu-xd: ")]
    assert message in line
    assert not (workplace / "exps").exists()


def test_main_py_without_a_gpu_trains_nothing(workplace: Path) -> None:
    import generative_recommenders

    checkout = Path(next(iter(generative_recommenders.__path__))).parent
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: NOT covered in this run: main.py where there is none")
    if not (checkout / "main.py").is_file():
        pytest.skip("no checkout of upstream: NOT covered in this run: its own main.py, no GPU")
    done = subprocess.run(
        [sys.executable, checkout / "main.py", "--gin_config_file", "gin/amazon_xd.gin"],
        cwd=workplace,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(checkout)},
    )
    # Its silence is why upstream-train exists; a patch of ours gives it a voice.
    patched = "say-no-gpu" in {p.name for p in inspect_tree(checkout).applied}
    assert done.returncode == (1 if patched else 0)
    assert not (workplace / "exps").exists()
