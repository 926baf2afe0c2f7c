"""Options of the job, apart from those of the command."""

from __future__ import annotations

import shlex

import pytest

from ckd_dist.core.errors import UserError
from ckd_dist.core.options import flag_words
from launch.jobs import FLAGS, SlurmConfig
from launch.submit import split


def test_options_of_the_job_and_of_the_command_are_told_apart():
    line = "ckd_dist.store verify S --slurm.nodes 2 --data.train X --wait --cpus=3 --dry_run --k 4"
    module, theirs, mine = split(flag_words(shlex.split(line), *FLAGS))
    assert module == "ckd_dist.store" and theirs == ["verify", "S", "--data.train", "X", "--k", "4"]
    assert mine == ["--slurm.nodes", "2", "--wait=true", "--cpus=3", "--dry_run=true"]


def test_a_time_limit_leaves_time_for_the_signal():
    SlurmConfig(timeout_min=4, signal_delay_s=120)
    with pytest.raises(UserError, match="give 7 or more"):
        SlurmConfig(timeout_min=4, signal_delay_s=300)
