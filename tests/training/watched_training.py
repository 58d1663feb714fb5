"""`hstu-xd train` in a process of its own, which tells its users and may get a signal in a step.

Usage: watched_training.py FILE RANK STEP SIGNAL[,SIGNAL] train ...

The main process appends a JSON list [epoch, step, users] a step to FILE. The process of this rank
gets the signals within this step; with two of them, the step then lasts until the second.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from hstu_xd.cli.app import main
from hstu_xd.training.trainer import Trainer

file, (rank, at), signals = Path(sys.argv[1]), map(int, sys.argv[2:4]), sys.argv[4].split(",")
step = Trainer._step


def watched(trainer, data, users):
    if trainer.world.is_main:
        with file.open("a") as stream:
            now = [trainer.progress.epoch, trainer.progress.step, users.tolist()]
            stream.write(json.dumps(now) + "\n")
    if (trainer.world.rank, trainer.progress.step) == (rank, at):
        for name in signals:
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(0)  # here handlers of signals run
        assert len(signals) == 1, "the second one ends the process"
    return step(trainer, data, users)


Trainer._step = watched
main(sys.argv[5:])
