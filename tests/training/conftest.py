"""What the tests of training share."""

import pytest
import torch

from tests.training.road import road


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped: (weights, metrics.jsonl)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    weights = road(folder)
    torch.set_num_threads(threads)
    return weights, (folder / "metrics.jsonl").read_bytes()
