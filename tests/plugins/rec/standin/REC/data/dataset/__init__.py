import csv
import random
from pathlib import Path

import torch
from torch.utils.data import Dataset


class SEQTrainDataset(Dataset):
    def __init__(self, config, dataload):
        self.item_num = dataload.item_num
        self.train_seq = dataload.train_feat["item_seq"]
        self.max_seq_length = config["MAX_ITEM_LIST_LENGTH"] + 1

    def __len__(self):
        return len(self.train_seq)

    def reconstruct_train_data(self, item_seq):
        items = [int(item) for item in item_seq][-self.max_seq_length :]
        padding = self.max_seq_length - len(items)
        drawn = [random.randint(1, self.item_num - 1) for _ in range(padding + self.max_seq_length)]
        valid = [0] * padding + [1] * (len(items) - 1)
        return tuple(map(torch.tensor, (drawn[:padding] + items, drawn[padding:], valid)))

    def __getitem__(self, index):
        return self.reconstruct_train_data(self.train_seq[index])


class _Texts:
    def __init__(self, config, dataload):
        self.tokens = dataload.id2token["item_id"]
        self.length = config["MAX_TEXT_LENGTH"]
        path = Path(config["text_path"], config["dataset"] + ".csv")
        with path.open(encoding="utf-8") as file:
            self.titles = {row["item_id"]: row["title"] for row in csv.DictReader(file)}

    def packed(self, items, kind):
        texts = [self.titles.get(str(self.tokens[item]), "")[: self.length] for item in items]
        ids = [[*map(ord, text), 0] for text in texts]
        parts = {
            "input_ids": [number for text in ids for number in text],
            "cu_input_lens": [len(text) for text in ids],
            "position_ids": [place for text in ids for place in range(len(text))],
        }
        return {f"{kind}_{name}": torch.tensor(part) for name, part in parts.items()}


class TextSEQTrainDataset(SEQTrainDataset):
    def __init__(self, config, dataload):
        super().__init__(config, dataload)
        self.train_time_seq = dataload.train_feat["time_seq"]
        self.num_negatives = config["num_negatives"]
        self.texts = _Texts(config, dataload)

    def __getitem__(self, index):
        items, drawn, valid = self.reconstruct_train_data(self.train_seq[index])
        return {
            "pos_item_ids": items,
            "neg_item_ids": drawn,
            **self.texts.packed(items, "pos"),
            **self.texts.packed(drawn, "neg"),
            "attention_mask": valid,
        }


class BatchTextDataset(Dataset):
    def __init__(self, config, dataload):
        self.item_num = dataload.item_num
        self.texts = _Texts(config, dataload)

    def __len__(self):
        return self.item_num

    def __getitem__(self, index):
        return self.texts.packed([index], "pos")


def customize_rmpad_collate(batch):
    packed = ("_input_ids", "_cu_input_lens", "_position_ids")
    return {
        key: (torch.cat if key.endswith(packed) else torch.stack)([row[key] for row in batch])
        for key in batch[0]
    }


class SeqEvalDataset(Dataset):
    def __init__(self, config, dataload, phase="valid"):
        self.dataload = dataload
        self.max_item_list_length = config["MAX_ITEM_LIST_LENGTH"]
        self.user_seq = list(dataload.user_seq.values())
        self.time_seq = list(dataload.time_seq.values())
        self.phase = phase

    def __len__(self):
        return len(self.user_seq)

    def __getitem__(self, index):
        last = 2 if self.phase == "valid" else 1
        items = [int(item) for item in self.user_seq[index]]
        history = items[:-last]
        width = self.max_item_list_length
        padded = ([0] * width + history)[-width:]
        return torch.tensor(history), padded, items[-last], [[0] * 6] * width


def seq_eval_collate(batch):
    histories, padded, targets, times = zip(*batch)
    rows = [torch.full_like(items, row) for row, items in enumerate(histories)]
    where = torch.cat(rows), torch.cat(histories)
    return (
        torch.tensor(padded),
        torch.tensor(times),
        where,
        torch.arange(len(batch)),
        torch.tensor(targets),
    )
