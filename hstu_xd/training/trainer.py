"""The training loop. Every step seeds itself, so a run resumes to the same numbers anywhere.

Step ``s`` draws its dropout and negatives from generators seeded by (seed, s) and epoch ``e`` its
order from (seed, e): nothing but the step number has to survive a kill. Metrics are appended to
metrics.jsonl, one JSON object a line, as they come, and go to the trackers of the run.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from hstu_xd.batch import JaggedBatch
from hstu_xd.data.batches import SequenceData, Split
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import HstuXdError
from hstu_xd.evaluation.cost import attention_cost
from hstu_xd.evaluation.metrics import (
    RankedTargets,
    check_group_is_there,
    grouped_metrics,
)
from hstu_xd.evaluation.protocol import DEFAULTS, Protocol
from hstu_xd.evaluation.ranks import rank_targets
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.objectives.objective import Objective, PreparesBatches
from hstu_xd.objectives.sampled_softmax import count_per_domain
from hstu_xd.training.checkpoint import (
    MODEL_FILE,
    load_checkpoint,
    load_state,
    load_weights,
    restore_optimizer,
    save_checkpoint,
    save_state,
)
from hstu_xd.training.distributed import DelayedMaximum, World
from hstu_xd.training.epochs import EpochTraining, Progress
from hstu_xd.training.extension import metrics_of, objective_of
from hstu_xd.training.interruption import stop_requests
from hstu_xd.training.metrics_log import MetricsLog
from hstu_xd.training.optimization import WeightAverage, optimizer_of, rate_at
from hstu_xd.training.settings import TrainSettings

# A loss that is not finite is noticed within this many steps and before anything is saved.
_CHECK_EVERY = 50


class _Loss(nn.Module):
    """Model and loss as one module, so that DDP sees every parameter used in one forward."""

    def __init__(self, model: CrossDomainHSTU, objective: Objective, *, bf16: bool) -> None:
        super().__init__()
        self.model = model
        self._objective, self._bf16 = objective, bf16

    def forward(self, batch: JaggedBatch, targets: Tensor, generator: torch.Generator) -> Tensor:
        with torch.autocast(targets.device.type, torch.bfloat16, enabled=self._bf16):
            return self._objective.loss(self.model, batch, targets, generator)


class Trainer(EpochTraining[Progress]):
    """Trains one model on one store into one run folder.

    Args:
        model: on the world's device.
        store: prepared interactions.
        settings: of the trainer.
        run: the run folder.
        world: this process among the others.
        protocol: of the evaluations.
        announce: called with a line after every epoch, in the first process.
        until: time of the last event of another run's log, which this one continues: every epoch
            trains on what came later and on a ``replay_share`` of the other users; None: on all.
        num_epochs: after which the training ends, where its rates go on as if it had
            ``settings.num_epochs`` of them; None: after those.
    """

    def __init__(
        self,
        model: CrossDomainHSTU,
        store: InteractionStore,
        settings: TrainSettings,
        run: Path,
        world: World,
        *,
        protocol: Protocol = DEFAULTS,
        announce: Callable[[str], object] = lambda line: None,
        until: int | None = None,
        num_epochs: int | None = None,
    ) -> None:
        if settings.main_module_bf16 and world.device.type != "cuda":
            raise HstuXdError("xd_train.main_module_bf16 needs CUDA; set it to False on CPU")
        self.model, self.settings, self.run, self.world = model, settings, run, world
        self.protocol, self._announce = protocol, announce
        domain, trained = settings.domain, settings.until
        self._data = {
            split: protocol.sequences(store, split, settings.window, domain=domain, until=trained)
            for split in Split
        }
        data = self._data[Split.TRAIN]
        news = data.users if until is None else data.begin_at_news(until, settings.news_context)
        self._news, self._others = news, np.setdiff1d(data.users, news)
        self._replayed = round(settings.replay_share * self._others.size)
        events = data.lengths(self._users_of(0))
        self.users_per_step = settings.users_per_step(events) * world.size
        # DDP would want to know of sparse gradients, and GPUs have memory at hand.
        is_sparse = world.size == 1 and world.device.type == "cpu"
        self._optimizer = optimizer_of(model, settings, sparse_table=is_sparse)
        decay = settings.average_decay
        self._average = WeightAverage(model, decay) if decay else None
        self._judged = self._average.model if self._average else model
        self._objective, self._metrics = objective_of(settings), metrics_of(settings)
        loss: nn.Module = _Loss(model, self._objective, bf16=settings.main_module_bf16)
        self._loss = DistributedDataParallel(loss) if world.size > 1 else loss
        log = MetricsLog(run, enabled=world.is_main)
        last = num_epochs or settings.num_epochs
        super().__init__(Progress(), log, last, settings.early_stop_patience)
        self._agreed = DelayedMaximum(world.size)

    def begin_with(
        self, weights: dict[str, Tensor], optimizer: dict[str, Tensor], source: Path
    ) -> None:
        """Start from weights and an optimiser's state instead of from random ones.

        Args:
            weights: of the model, by name.
            optimizer: as :func:`hstu_xd.training.checkpoint.optimizer_tensors` returns it.
            source: where they are from, for errors.

        Raises:
            InputError: the weights are not of this model.
        """
        load_weights(self.model, weights, source)
        restore_optimizer(self.model, self._optimizer, optimizer)

    def resume(self, processes: int) -> None:
        """Continue from the run's last checkpoint: weights, optimiser, progress, metrics file.

        Without a checkpoint yet, begin again.

        Args:
            processes: that the run was begun with.
        """
        stored = load_state(self.run, self.model, self._optimizer, self.world)
        if stored is not None:
            progress, tensors = stored
            if self._average:
                self._average.restore(tensors)
            users_per_step = self.users_per_step // self.world.size * processes
            self.progress = Progress.from_stored(progress, users_per_step)
            if not self.world.is_main:
                self.progress.loss_sum = 0.0  # the first process has taken over all of it
        self._log.rewind(self.progress.metrics_bytes, self.progress.step)

    def fit(self, *, read_test: bool = True) -> dict[str, Any]:
        """Train until the epochs or the patience run out; returns the run's summary.

        Args:
            read_test: measure the picked epoch on the test split, too, unless it was trained on.

        Raises:
            Interrupted: one of the processes was asked to stop; :meth:`resume` goes on there.
        """
        with stop_requests(self._request), self._log:
            self._train_epochs()
            summary = self._summarise(read_test=read_test)
            self._agreed.finish()
            return summary

    def check_group(self) -> None:
        """Refuse to pick epochs by a group of targets that validation has none of.

        Raises:
            InputError: it has none.
        """
        name = self.settings.select_metric
        if "[" not in name or self.settings.until is not Split.TRAIN:
            return
        # Which groups there are depends on candidates, too: so the new model is measured.
        found = list(self.evaluate(Split.VALID))
        check_group_is_there("xd_train.select_metric", name, found, "validation targets")

    @property
    def users_per_epoch(self) -> dict[str, int]:
        """Numbers of users whom every epoch trains on, and of those whom it draws from others."""
        return {"with news": self._news.size, "of the others an epoch": self._replayed}

    def _stop_if_asked(self) -> None:
        """Leave where any process was asked to; all of them do so at the same call."""
        if number := self._agreed(self._request.signal):
            self._stop(number)

    def _train_epoch(self) -> None:
        settings, progress, data = self.settings, self.progress, self._data[Split.TRAIN]
        self.model.train()
        left = self.batches(progress.epoch, done=progress.users_in_epoch)
        events = int(data.lengths(self._users_of(progress.epoch)).sum())
        bar = tqdm(
            total=events,
            unit="events",
            unit_scale=True,
            desc=f"epoch {progress.epoch}",
            disable=None if self.world.is_main else True,
            leave=False,
        )
        with bar:
            bar.update(events - sum(int(data.lengths(b).sum()) for b in left))
            for batch_users in left:
                self._stop_if_asked()
                bar.update(self._step(data, batch_users))
                progress.users_in_epoch += batch_users.size
                if progress.step % settings.checkpoint_every == 0:
                    self._save()

    def batches(self, epoch: int, *, done: int = 0) -> list[np.ndarray]:
        """Return the users of each global batch of an epoch, in the epoch's own order.

        Args:
            epoch: counted from 0.
            done: users at the beginning of that order, who are left out.
        """
        users = self._users_of(epoch)[done:]
        size = self.users_per_step
        return [users[i : i + size] for i in range(0, users.size, size)]

    def _users_of(self, epoch: int) -> np.ndarray:
        """Return whom an epoch trains on, in its own order."""
        draw = np.random.default_rng([self.settings.random_seed, epoch])
        if not self._replayed:
            return draw.permutation(self._news)
        replayed = draw.choice(self._others, self._replayed, replace=False)
        return draw.permutation(np.concatenate([self._news, replayed]))

    def step(self, users: np.ndarray, mark: Callable[[str], object] = lambda phase: None) -> int:
        """Take one optimiser step on a global batch, and return its number of tokens.

        Args:
            users: training users.
            mark: called with the name of each phase that is over, but for the last one.
        """
        return self._step(self._data[Split.TRAIN], users, mark)

    def _step(
        self,
        data: SequenceData,
        users: np.ndarray,
        mark: Callable[[str], object] = lambda phase: None,
    ) -> int:
        settings, progress, device = self.settings, self.progress, self.world.device
        began = time.perf_counter()
        seed = int(
            np.random.SeedSequence([settings.random_seed, progress.step]).generate_state(1)[0]
        )
        torch.manual_seed(seed + self.world.rank)
        generator = torch.Generator().manual_seed(seed)
        tokens = int(data.lengths(users).sum())
        own = users[self.world.rank :: self.world.size]
        # All processes take part in a step; one without a user does so with a loss of zero.
        batch, targets = data.batch(own if own.size else users[:1])
        # Counted here, before the copy: to count on a GPU would be to wait for it.
        counts = count_per_domain(batch.target_domains, self.model.catalog.num_domains)
        batch = replace(batch, targets_per_domain=tuple(counts))
        if isinstance(self._objective, PreparesBatches):
            batch = self._objective.prepare(self.model.catalog, batch, targets, generator)
        batch, targets = batch.to(device), targets.to(device)
        mark("batch")
        loss = self._loss(batch, targets, generator)
        if not own.size:
            loss = 0 * loss
        mark("forward")
        self._optimizer.zero_grad(set_to_none=True)
        # DDP averages gradients over processes; the mean is over the tokens of all of them.
        (loss * (self.world.size / tokens)).backward()
        mark("backward")
        epochs = progress.epoch + progress.users_in_epoch / sum(self.users_per_epoch.values())
        rate = rate_at(settings, progress.step, epochs / settings.num_epochs)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        if self._average:
            self._average.update()
        progress.loss_sum += loss.item() if device.type == "cpu" else self._defer(loss)
        progress.loss_tokens += tokens
        progress.step += 1
        if progress.step % _CHECK_EVERY == 0:
            self._check_finite()
        progress.train_seconds += time.perf_counter() - began
        progress.train_events += tokens
        return tokens

    def _defer(self, loss: Tensor) -> float:
        """Keep a loss on the device until it is needed: reading it would stall every step."""
        self._pending = getattr(self, "_pending", torch.zeros_like(loss)) + loss.detach()
        return 0.0

    def _check_finite(self) -> None:
        pending = self.__dict__.pop("_pending", None)
        if pending is not None:
            self.progress.loss_sum += pending.item()
        if not np.isfinite(self.progress.loss_sum):
            temperature = getattr(self._objective, "temperature", None)
            raise HstuXdError(
                f"the loss is not finite at step {self.progress.step}; the checkpoints in "
                f"{self.run} are from before it. Lower xd_train.learning_rate "
                f"({self.settings.learning_rate}) "
                + (f"or raise xd_train.temperature ({temperature}) " if temperature else "")
                + "and train again"
            )

    def _finish_epoch(self, began: float) -> None:
        progress = self.progress
        self._check_finite()
        row = {"loss": self._total_loss() / progress.loss_tokens}
        self._log.write(Split.TRAIN, progress.epoch, progress.step, row)
        judged = self._judge_epoch()
        told = self._told(row["loss"], judged, time.perf_counter() - began)
        progress.epoch, progress.users_in_epoch = progress.epoch + 1, 0
        progress.loss_sum, progress.loss_tokens = 0.0, 0
        # Only here: rows of an epoch that is not finished come again.
        progress.metrics_bytes = self._log.size()
        self._save()
        # Last: nobody may read it any more, and the epoch is kept all the same.
        if self.world.is_main:
            self._announce(told)

    def _judge_epoch(self) -> str:
        """Keep the epoch's model if it is the best or none is picked, and say how it did."""
        progress, name = self.progress, self.settings.select_metric
        is_kept, told = True, "kept until the next"
        if self.settings.until is Split.TRAIN:
            values = self.evaluate(Split.VALID)
            self._log.write(Split.VALID, progress.epoch, progress.step, values)
            is_kept = self._is_best(values[name])
            told = f"valid {name} {values[name]:.4f} ({self._best_told})"
        else:
            progress.best_epoch = progress.epoch
        if is_kept and self.world.is_main:
            epoch = {"epoch": progress.epoch}
            save_checkpoint(self.run / MODEL_FILE, self._judged.state_dict(), epoch)
        return told

    def _told(self, loss: float, judged: str, seconds: float) -> str:
        """Say in a line how an epoch went, and how long the others will take at most."""
        progress = self.progress
        left = (self._num_epochs - 1 - progress.epoch) * seconds
        rate = progress.train_events / max(1e-9, progress.train_seconds)
        return (
            f"epoch {progress.epoch}: loss {loss:.4f}, {judged}, {rate:,.0f} events/s, "
            f"{seconds:,.1f} s; at most {left:,.0f} s left"
        )

    def evaluate(self, split: Split) -> dict[str, float]:
        """Metrics of a split; the processes share the users.

        Raises:
            Interrupted: as :meth:`fit`, between two batches.
        """
        data, size = self._data[split], self.settings.eval_batch_size
        users = data.users[self.world.rank :: self.world.size]
        # As many calls in every process: their numbers of batches may differ by one.
        calls = iter(range(math.ceil(data.users.size // self.world.size / size)))
        ranked = rank_targets(
            self._judged,
            data,
            users,
            protocol=self.protocol,
            scorer=self._objective.scorer(self._judged),
            batch_size=size,
            progress=lambda _: next(calls, None) is not None and self._stop_if_asked(),
        )
        if self.world.size > 1:
            ranked = RankedTargets.joined(self.world.gather(ranked.to("cpu")))
        names = self.model.catalog.domain_names
        return grouped_metrics(ranked, names, self.protocol, self._metrics) | data.counts

    def _total_loss(self) -> float:
        """Sum the epoch's loss so far over all processes."""
        own = torch.tensor(self.progress.loss_sum, dtype=torch.float64, device=self.world.device)
        return float(self.world.sum(own))

    def _save(self) -> None:
        self._check_finite()
        total = self._total_loss()
        if not self.world.is_main:
            return
        progress = asdict(self.progress) | {"loss_sum": total}
        average = self._average.tensors() if self._average else {}
        save_state(self.run, self.model, self._optimizer, progress, average)

    def _summarise(self, *, read_test: bool) -> dict[str, Any]:
        """Measure the model that was kept on what it was not trained on, the test once or never."""
        best = self.run / MODEL_FILE
        weights, metadata = self.world.from_main(lambda: load_checkpoint(best))
        load_weights(self.model, weights, best)
        self._judged, progress = self.model, self.progress
        until, epoch, measured = self.settings.until, metadata["epoch"], {}
        for split in until.measured(read_test=read_test):
            measured[split.value] = self.evaluate(split)
        if "test" in measured:
            self._log.write(Split.TEST, epoch, progress.step, measured["test"])
        cost = attention_cost(self.model, self._data[Split.TEST])
        summary = {
            **({"best_epoch": epoch} if until is Split.TRAIN else {}),
            "epochs": progress.epoch,
            **measured,
            "seconds_per_step": progress.train_seconds / max(1, progress.step),
            "events_per_second": progress.train_events / max(1e-9, progress.train_seconds),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "attention_pairs": cost.pairs,
            "state_bytes": cost.state_bytes,
            "seed": self.settings.random_seed,
        }
        self._log.finish(summary)
        return summary
