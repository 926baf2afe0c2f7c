"""Sum a one over all processes and print it."""

import torch

from ckd_dist.core import dist
from ckd_dist.core.process import run_process


def main():
    with dist.process_group():
        print("sum", int(dist.all_reduce_sum(torch.ones(1))), flush=True)


run_process(main)
