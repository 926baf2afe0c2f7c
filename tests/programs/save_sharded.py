"""Shard a network by FSDP and save it in FOLDER: before that all of it, whole.pt; then step/, a checkpoint of
torch.distributed; and what each rank has of it, rank0.pt and rank1.pt."""

import sys
from pathlib import Path

import torch
import torch.distributed as td
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ckd_dist.nn.models import build_model

folder = Path(sys.argv[1])
td.init_process_group("gloo")
torch.manual_seed(0)
model = build_model("resnet8", 10)
if td.get_rank() == 0:
    torch.save(model.state_dict(), folder / "whole.pt")
fully_shard(model, mesh=init_device_mesh("cpu", (td.get_world_size(),)))
dcp.save({"app": {"model": get_model_state_dict(model)}}, checkpoint_id=folder / "step")
torch.save(model.state_dict(), folder / f"rank{td.get_rank()}.pt")
td.destroy_process_group()
