"""train_teacher with a linear model: without batch norm, the world size must not change the numbers."""

from torch import nn

from ckd_dist import models, train_teacher
from ckd_dist.config import TrainTeacherConfig, run_command

models._CIFAR["linear"] = lambda num_classes: nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, num_classes))
run_command(train_teacher.main, TrainTeacherConfig, "train_linear")
