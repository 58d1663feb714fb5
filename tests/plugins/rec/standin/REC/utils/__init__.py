import logging
import sys

from REC.utils.utils import get_model

__all__ = ["get_model", "init_logger"]


def init_logger(config):
    logging.basicConfig(level=logging.INFO, handlers=[logging.StreamHandler(sys.stdout)])
