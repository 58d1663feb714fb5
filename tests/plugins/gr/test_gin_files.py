"""Every gin file for upstream trains, and every binding in it is read."""

from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
import torch

import gin
from hstu_xd.plugins.gr.research import HOST
from hstu_xd.plugins.gr.research.domain_batches import SESSION
from hstu_xd.plugins.gr.research.upstream_trainer import upstream_train
from hstu_xd.plugins.host import activate

ROOT = Path(__file__).parents[3]
FILES = [
    path
    for path in sorted((ROOT / "gin").rglob("*.gin"))
    if "standalone" not in path.parts and not path.name.startswith("dlrm_")
]

SMALL = [
    "train_fn.num_epochs = 1",
    "train_fn.max_sequence_length = 10",
    "train_fn.local_batch_size = 32",
    "train_fn.num_negatives = 8",
    "create_data_loader.num_workers = 0",
    "create_data_loader.prefetch_factor = None",
]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, tiny_store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder laid out as an upstream checkout: gin files, our store, a tiny ml-1m."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gin").symlink_to(ROOT / "gin")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "amazon").symlink_to(tiny_store)
    write_tiny_ml_1m(tmp_path / "tmp")
    handle = activate(HOST)
    yield
    handle.revert()
    SESSION.open(None)
    gin.clear_config()


def write_tiny_ml_1m(folder: Path) -> None:
    (folder / "ml-1m").mkdir(parents=True)
    (folder / "processed" / "ml-1m").mkdir(parents=True)
    random = torch.Generator().manual_seed(1)
    films = list(range(1, 90, 2))  # ids with holes, as MovieLens has them
    genres = ["Drama|War", "Comedy", "Action|Comedy"]
    pl.DataFrame(
        {
            "movie_id": films,
            "cleaned_title": ["A Film"] * len(films),
            "year": [1999] * len(films),
            "genres": [genres[film % 3] for film in films],
        }
    ).write_csv(folder / "processed" / "ml-1m" / "movies.csv")
    pl.DataFrame(
        {"item": films, "domain": [genres[film % 3].split("|")[0] for film in films]}
    ).write_csv(folder / "ml-1m" / "genres.csv")
    picks = [torch.randint(len(films), (6,), generator=random).tolist() for _ in range(60)]
    pl.DataFrame(
        {
            "user_id": range(60),
            "sequence_item_ids": [",".join(str(films[i]) for i in pick) for pick in picks],
            "sequence_ratings": [",".join("345345"[: len(pick)]) for pick in picks],
            "sequence_timestamps": [",".join(str(1000 + i) for i in range(6)) for _ in picks],
        }
    ).write_csv(folder / "ml-1m" / "sasrec_format.csv")


def bindings() -> set[str]:
    return {f"{key[1]}.{name}" for key, values in gin.config._CONFIG.items() for name in values}


def read_bindings() -> set[str]:
    read = {
        f"{key[1]}.{name}"
        for key, values in gin.config._OPERATIVE_CONFIG.items()
        for name in values
    }
    # HSTU_XD takes its sizes from upstream's block without calling upstream's function.
    if gin.get_bindings("train_fn")["main_module"] == "HSTU_XD":
        read |= {f"{PREFIX}.hstu_encoder.{name}" for name in gin.get_bindings("hstu_encoder")}
    return read


PREFIX = "generative_recommenders.research.modeling.sequential.encoder_utils"


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.stem)
def test_file_trains_and_every_binding_is_read(file: Path, tmp_path: Path) -> None:
    upstream_train(Path("gin") / file.relative_to(ROOT / "gin"), SMALL)
    assert bindings() - read_bindings() == set()
    assert len(list((tmp_path / "ckpts").rglob("*_ep0"))) == 1


def test_the_twin_differs_in_the_encoder_alone() -> None:
    shared = (ROOT / "gin" / "amazon_hstu.gin").read_text()
    model = (ROOT / "gin" / "amazon_xd.gin").read_text()
    assert 'include "gin/amazon_hstu.gin"' in model
    own = [line for line in model.splitlines() if "=" in line and not line.startswith("#")]
    assert all(line.startswith(("train_fn.main_module", "xd_encoder.")) for line in own)
    assert "xd_encoder" not in shared


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.stem)
def test_header_names_the_command_to_run(file: Path) -> None:
    name = f"gin/{file.relative_to(ROOT / 'gin')}"
    head = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert any(line.endswith(f"python main.py --gin_config_file {name}") for line in head)
