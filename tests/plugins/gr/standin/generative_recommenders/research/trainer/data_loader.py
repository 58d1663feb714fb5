"""Batches of a data set, one share a process."""

import os

from torch.utils.data import DataLoader, DistributedSampler

import gin


@gin.configurable
def create_data_loader(
    dataset, batch_size, world_size, rank, shuffle,
    prefetch_factor=128, num_workers=os.cpu_count(), drop_last=False,  # noqa: B008
):  # fmt: skip
    sampler = DistributedSampler(dataset, world_size, rank, shuffle=shuffle, drop_last=drop_last)
    load = {"num_workers": num_workers, "prefetch_factor": prefetch_factor}
    return sampler, DataLoader(dataset, batch_size, sampler=sampler, **load)
