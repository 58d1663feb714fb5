import torch


def all_gather(data, group=None, sync_grads=False):
    assert torch.distributed.get_world_size() == 1
    return data.unsqueeze(0)
