import random

import torch
from torch.utils.data import Dataset


class SEQTrainDataset(Dataset):
    def __init__(self, config, dataload):
        self.item_num = dataload.item_num
        self.train_seq = dataload.train_feat["item_seq"]
        self.max_seq_length = config["MAX_ITEM_LIST_LENGTH"] + 1

    def __len__(self):
        return len(self.train_seq)

    def __getitem__(self, index):
        items = [int(item) for item in self.train_seq[index]][-self.max_seq_length :]
        padding = self.max_seq_length - len(items)
        drawn = [random.randint(1, self.item_num - 1) for _ in range(padding + self.max_seq_length)]
        valid = [0] * padding + [1] * (len(items) - 1)
        return tuple(map(torch.tensor, (drawn[:padding] + items, drawn[padding:], valid)))


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
