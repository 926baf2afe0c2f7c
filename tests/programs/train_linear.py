"""train_teacher with a linear model: without batch norm, the world size must not change the numbers. PAUSE in the
environment: so many seconds in every step, for a run that lives long enough to be interrupted; a job that starts again
goes on without."""

import os
import time

from torch import nn

from ckd_dist import train_teacher
from ckd_dist.core.process import run_command
from ckd_dist.nn.cifar import NETWORKS
from ckd_dist.train.learner import Learner
from ckd_dist.train.options import TrainTeacherConfig

NETWORKS["linear"] = lambda num_classes: nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, num_classes))
train_step = Learner.train_step


pause = 0.0 if int(os.environ.get("SLURM_RESTART_COUNT", "0")) else float(os.environ.get("PAUSE", "0"))


def pause_and_train(learner, batch):
    time.sleep(pause)
    train_step(learner, batch)


Learner.train_step = pause_and_train  # type: ignore[method-assign]
run_command(train_teacher.main, TrainTeacherConfig, "train_linear")
