"""What all tests share. One thread each: two pytest workers with two OpenMP threads apiece on two
cores spend most of their time spinning. Where a test needs two, they wait without spinning."""

import gc
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Before torch is imported, and for every subprocess. Where Triton is installed, torch.compile would
# start a process for it, which a CPU does not need.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TORCH_WARM_POOL": "0"}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """An empty folder with shards in ./data, the working directory of the runs."""
    from trainer import make_data

    make_data(tmp_path / "data")
    return tmp_path


def pytest_xdist_auto_num_workers(config) -> int:
    """A worker more than there are cores, because many tests wait for other processes; at most 8."""
    from prepare_fineweb import cores

    return min(cores(), 7) + 1


def pytest_collection_finish(session) -> None:
    """What PyTorch has made at import is frozen, or each gc.collect of a test would walk through it."""
    gc.freeze()
