"""How ranks find each other, and how their group ends."""

from __future__ import annotations

import socket

import pytest
import torch.distributed as td

from ckd_dist.core import dist
from ckd_dist.core.errors import UserError


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ([("a", None), ("a", None)], ("gloo", None)),
        ([("a", "0")], ("nccl", None)),
        ([("a", "0"), ("a", "1"), ("b", "0"), ("b", "1")], ("nccl", None)),
        ([("a", "0"), ("a", "0")], ("gloo", "ranks 0 and 1 share a GPU of a")),
        ([("a", "0"), ("b", "0"), ("b", "1"), ("b", "0")], ("gloo", "ranks 1 and 3 share a GPU of b")),
        ([("a", "0"), ("b", None)], ("gloo", "rank 1 on b has no GPU")),
        ([("a", None), ("a", "0")], ("gloo", "rank 0 on a has no GPU")),
    ],
)
def test_nccl_is_for_ranks_that_all_have_a_gpu_of_their_own_and_otherwise_the_reason_is_told(devices, expected):
    assert dist.backend(devices) == expected


def test_only_the_orderly_end_takes_the_group_down_which_waits_for_all_ranks(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in group.items():
        monkeypatch.setenv(name, value)
    taken_down, destroy = [], td.destroy_process_group
    monkeypatch.setattr(td, "destroy_process_group", lambda: taken_down.append(True))
    for error in (UserError, SystemExit, KeyboardInterrupt):
        with pytest.raises(error), dist.process_group():
            raise error
        assert td.is_initialized() and not taken_down
        destroy()
    with dist.process_group():
        assert td.is_initialized()
    destroy()
    assert taken_down == [True]
