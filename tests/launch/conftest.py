"""A SLURM cluster for each file of these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.cluster import Cluster, temporary_cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A SLURM cluster of eight nodes for the tests of a file."""
    with temporary_cluster(nodes=8) as started:
        yield started
