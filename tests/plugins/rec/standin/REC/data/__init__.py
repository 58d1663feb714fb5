from REC.data.utils import bulid_dataloader, load_data

__all__ = ["bulid_dataloader", "load_data"]
