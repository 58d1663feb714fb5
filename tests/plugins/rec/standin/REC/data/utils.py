import csv
import importlib
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler


class Data:
    def __init__(self, config):
        path = Path(config["data_path"], config["dataset"] + ".csv")
        with path.open(encoding="utf-8") as file:
            rows = [(r["item_id"], r["user_id"], int(r["timestamp"])) for r in csv.DictReader(file)]
        tokens = list(dict.fromkeys(item for item, _, _ in rows))
        self.id2token = {"item_id": np.array(["[PAD]", *tokens])}
        self.number = {token: i for i, token in enumerate(tokens, 1)}
        self.item_num = len(tokens) + 1
        self.rows = sorted(rows, key=lambda row: row[2])

    def build(self):
        self.user_seq, self.time_seq = {}, {}
        for item, user, time in self.rows:
            self.user_seq.setdefault(user, []).append(self.number[item])
            self.time_seq.setdefault(user, []).append(time)
        self.user_seq = {user: np.array(items) for user, items in self.user_seq.items()}
        self.time_seq = {user: np.array(times) for user, times in self.time_seq.items()}
        self.train_feat = {
            "item_seq": [items[:-2] for items in self.user_seq.values()],
            "time_seq": [times[:-2] for times in self.time_seq.values()],
        }


def load_data(config):
    return Data(config)


def bulid_dataloader(config, dataload):
    table = {"HSTU": ("SEQTrainDataset", None), "HLLM": ("TextSEQTrainDataset", "rmpad")}
    module = importlib.import_module("REC.data.dataset")
    train_name, packing = table[config["model"].removeprefix("Personalized")]
    train, evaluated = getattr(module, train_name), module.SeqEvalDataset
    dataload.build()
    samples = train(config, dataload)
    loaders = [
        DataLoader(
            samples,
            batch_size=config["train_batch_size"],
            num_workers=11,
            pin_memory=True,
            sampler=DistributedSampler(samples),
            collate_fn=packing and module.customize_rmpad_collate,
        )
    ]
    loaders += [
        DataLoader(
            evaluated(config, dataload, phase=phase),
            batch_size=config["eval_batch_size"],
            num_workers=11,
            pin_memory=True,
            collate_fn=module.seq_eval_collate,
        )
        for phase in ("valid", "test")
    ]
    return loaders
