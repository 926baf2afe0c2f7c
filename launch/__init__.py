"""Jobs on SLURM, through submitit: one job, or the whole graph of them."""
