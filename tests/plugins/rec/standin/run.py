import argparse
import os
import random

import torch
import torch.distributed as dist
from REC.config import Config
from REC.data import bulid_dataloader, load_data
from REC.trainer import Trainer
from REC.utils import get_model, init_logger


def convert_str(s):
    if s.lower() in ("true", "false"):
        return s.lower() == "true"
    try:
        return int(s) if float(s).is_integer() else float(s)
    except ValueError:
        return s


def run_loop(local_rank, config_file, extra_args):
    config = Config(config_file_list=config_file)
    config["device"] = torch.device("cuda", local_rank)
    for key, value in zip(extra_args[::2], extra_args[1::2]):
        config[key[2:]] = convert_str(value)
    random.seed(config["seed"])
    torch.manual_seed(config["seed"])
    init_logger(config)
    dataload = load_data(config)
    train_loader, valid_loader, test_loader = bulid_dataloader(config, dataload)
    trainer = Trainer(config, get_model(config["model"])(config, dataload))
    trainer.fit(train_loader, valid_loader)
    print(f"test result: {dict(trainer.evaluate(test_loader))}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--config_file", nargs="+", type=str)
    args, extra_args = parser.parse_known_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend="nccl")
    run_loop(int(os.environ["LOCAL_RANK"]), args.config_file, extra_args)
