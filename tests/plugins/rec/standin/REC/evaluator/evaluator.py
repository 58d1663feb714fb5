from collections import OrderedDict

import torch


class DataStruct:
    def __init__(self):
        self._data_dict = {}

    def get(self, name):
        return self._data_dict[name]

    def set(self, name, value):
        self._data_dict[name] = value


class Evaluator:
    def __init__(self, config):
        self.config = config

    def evaluate(self, dataobject):
        hits = dataobject.get("rec.topk")[:, :-1].double()
        gain = 1 / torch.log2(torch.arange(hits.shape[1]) + 2.0)
        result = OrderedDict()
        for name, values in (("recall", hits), ("ndcg", hits * gain)):
            for k in self.config["topk"]:
                result[f"{name}@{k}"] = float(values[:, :k].sum())
        return result
