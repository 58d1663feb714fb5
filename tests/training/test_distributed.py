"""What several processes share."""

import gc
import weakref

import torch.distributed as dist

from hstu_xd.training.distributed import keep_group


def test_a_process_group_outlives_its_end() -> None:
    """A DDP module that is freed later must not be what ends gloo's thread."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    keep_group()
    group = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    gc.collect()
    assert group() is not None
