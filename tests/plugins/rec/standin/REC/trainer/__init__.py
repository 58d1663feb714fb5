from REC.trainer.trainer import Trainer

__all__ = ["Trainer"]
