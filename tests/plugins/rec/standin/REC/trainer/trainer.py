from logging import getLogger
from pathlib import Path

import deepspeed  # noqa: F401
import numpy as np
import torch
from REC.data.dataset import BatchTextDataset, customize_rmpad_collate
from REC.evaluator import DataStruct, Evaluator
from torch.utils.data import DataLoader


class Fabric:
    def __init__(self, accelerator, devices="auto", **others):
        assert accelerator == "gpu" or not torch.cuda.is_available()
        self.device = torch.device("cuda" if accelerator == "gpu" else "cpu")

    def setup(self, model):
        return torch.nn.parallel.DistributedDataParallel(
            model.to(self.device), find_unused_parameters=True
        )


class Trainer:
    def __init__(self, config, model):
        self.config, self.model = config, model
        self.logger = getLogger()
        self.device = config["device"]
        self.lite = Fabric(accelerator="gpu")
        self.evaluator = Evaluator(config)
        self.best = -1.0
        folder = Path(config["checkpoint_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"{config['model']}-0.pth"

    def fit(self, train_data, valid_data):
        self.model = self.lite.setup(self.model)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.config["learning_rate"])
        for epoch in range(self.config["epochs"]):
            train_data.sampler.set_epoch(epoch)
            self.model.train()
            for batch in train_data if self.config["need_training"] is not False else ():
                loss = self.model(self.to_device(batch))["loss"]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            result = self.evaluate(valid_data, load_best_model=False)
            self.logger.info("valid result: %s", dict(result))
            if result[self.config["valid_metric"].lower()] > self.best:
                self.best = result[self.config["valid_metric"].lower()]
                rng = torch.cuda.get_rng_state()
                state = {"model": self.model.state_dict(), "config": self.config, "rng": rng}
                torch.save(state, self.file)
        return self.best

    def to_device(self, data):
        if isinstance(data, dict):
            return {name: value.to(self.device) for name, value in data.items()}
        return tuple(value.to(self.device) for value in data)

    @torch.no_grad()
    def _full_sort_batch_eval(self, batched_data):
        user, time_seq, history_index, positive_u, positive_i = batched_data
        entries = (*self.to_device((user, time_seq)), self.item_feature)
        if self.config["model"] == "HLLM":
            scores = self.model(entries, mode="predict")
        else:
            scores = self.model.module.predict(*entries)
        scores[:, 0] = -np.inf
        scores[history_index] = -np.inf
        return scores, positive_u, positive_i

    @torch.no_grad()
    def compute_item_feature(self, config, data):
        if not config["use_text"]:
            self.item_feature = self.model.module.compute_item_all()
            return
        loader = DataLoader(
            BatchTextDataset(config, data),
            batch_size=64,
            num_workers=14,
            pin_memory=True,
            collate_fn=customize_rmpad_collate,
        )
        features = [self.model(self.to_device(batch), mode="compute_item") for batch in loader]
        self.item_feature = torch.cat(features)

    @torch.no_grad()
    def evaluate(self, eval_data, load_best_model=True):
        if load_best_model:
            self.model.load_state_dict(torch.load(self.file, map_location="cpu")["model"])
        self.model.eval()
        self.compute_item_feature(self.config, eval_data.dataset.dataload)
        rows = []
        for batch in eval_data:
            scores, positive_u, positive_i = self._full_sort_batch_eval(batch)
            top = scores.topk(max(self.config["topk"]), dim=1).indices
            hits = top[positive_u] == positive_i.unsqueeze(1).to(top.device)
            rows.append(torch.cat([hits.int(), torch.ones(len(hits), 1, dtype=torch.int)], dim=1))
        struct = DataStruct()
        struct.set("rec.topk", torch.cat(rows).cpu())
        result = self.evaluator.evaluate(struct)
        for name, value in result.items():
            result[name] = round(value / len(eval_data.dataset), 7)
        return result
