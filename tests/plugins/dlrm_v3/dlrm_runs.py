"""A model with its optimisers as upstream builds them, in one process or in one of several."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import upstream_dlrm  # noqa: F401  (skips where upstream is not importable)
from generative_recommenders.dlrm_v3.train import train_ranker
from generative_recommenders.dlrm_v3.train import utils as train_utils
from generative_recommenders.dlrm_v3.utils import MetricsLogger
from torchrec.distributed.planner.types import ParameterConstraints

import gin
from hstu_xd.plugins.dlrm_v3 import HOST
from hstu_xd.plugins.dlrm_v3.cpu_worker import UTILS, cpu_rebindings
from hstu_xd.plugins.host import activate
from hstu_xd.plugins.rebinding import Rebinding, apply

CPU = torch.device("cpu")


@contextmanager
def process_of(
    store: Path, port: str, bindings: str = "", *, rank: int = 0, world_size: int = 1
) -> Iterator[None]:
    """One of several processes with everything switched on, and no dropout."""
    recipe = (Path(__file__).parents[3] / "gin" / "dlrm_stock.gin").read_text()
    text = "\n".join(line for line in recipe.splitlines() if not line.startswith("import"))
    handle = activate(HOST)
    gin.parse_config(text)
    gin.parse_config(
        f'dataset = "xd:{store}"\nxd_encoder.domain_mask = True\nxd_encoder.tape = True\n'
        "xd_encoder.ddsr = True\n"
        "xd_dlrm.hstu_input_dropout_ratio = 0.0\nxd_dlrm.hstu_linear_dropout_rate = 0.0\n"
        f"{bindings}"
    )
    # Several processes share every table by its rows; the planner would part them by tables.
    shared = {"item_id": ParameterConstraints(sharding_types=["row_wise"])}
    planner = Rebinding(
        UTILS, "EmbeddingShardingPlanner", lambda original: partial(original, constraints=shared)
    )
    try:
        with apply((*cpu_rebindings(), *((planner,) if world_size > 1 else ()))):
            train_ranker.setup(rank=rank, world_size=world_size, master_port=port, device=CPU)
            try:
                yield
            finally:
                dist.destroy_process_group()
    finally:
        handle.revert()
        gin.clear_config()


class Run:
    """A model with its optimisers, as upstream builds them."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        model, self.config, tables = train_utils.make_model()
        self.model, self.optimizer = train_utils.make_optimizer_and_shard(
            model, CPU, self.world_size
        )
        loader, _ = train_ranker.make_train_test_dataloaders(
            hstu_config=self.config, embedding_table_configs=tables, batch_size=4
        )
        self.requests = loader.dataset.dataset.dataset
        self.metrics = MetricsLogger(self.config.multitask_configs, 4, 10, CPU, self.rank)

    def train(self, batches: range) -> None:
        for number in batches:
            torch.manual_seed(number)
            self.step(list(range(4 * number, 4 * number + 4)))

    def train_on_evaluation(self, batches: range) -> None:
        """Train on requests with the same candidates every time, a share of each batch."""
        for number in batches:
            self.step(self.evaluated(number)[self.rank :: self.world_size])

    def evaluated(self, number: int) -> list[int]:
        """Four requests of evaluation, of users with long and with short histories."""
        requests = self.requests.requests
        step = (len(requests) - requests.num_train) // 4
        return [requests.num_train + number + step * share for share in range(4)]

    def step(self, numbers: Sequence[int]) -> None:
        sample = self.requests.get_samples(list(numbers))
        self.optimizer.zero_grad()
        losses = self.model(sample.uih_features_kjt, sample.candidates_features_kjt)[2]
        sum(losses.values()).backward()
        self.optimizer.step()

    def save(self, folder: Path, number: int = 3) -> None:
        train_utils.save_dmp_checkpoint(
            model=self.model,
            optimizer=self.optimizer,
            metric_logger=self.metrics,
            rank=self.rank,
            batch_idx=number,
            path=str(folder),
        )

    def start(self) -> None:
        self.load(Path())

    def load(self, folder: Path) -> None:
        train_ranker.load_dmp_checkpoint(
            model=self.model,
            optimizer=self.optimizer,
            metric_logger=self.metrics,
            device=CPU,
            path="" if folder == Path() else str(folder),
        )

    def parameters(self) -> dict[str, Any]:
        """All of them whole, also where this process has a part."""
        return {name: whole(value).clone() for name, value in self.model.state_dict().items()}


def whole(value: Any) -> torch.Tensor:
    if not hasattr(value, "local_shards"):
        return value.detach()
    parts: list[Any] = [None] * dist.get_world_size()
    own = [(shard.metadata.shard_offsets, shard.tensor.detach()) for shard in value.local_shards()]
    dist.all_gather_object(parts, own)
    found = torch.full(value.size(), torch.nan)
    for (row, column), tensor in (shard for part in parts for shard in part):
        found[row : row + tensor.shape[0], column : column + tensor.shape[1]] = tensor
    assert not found.isnan().any()
    return found
