"""BatchNorm re-estimation: the statistics of the data given, and nothing else changed."""

import pytest
import torch
from torch import nn

from bar_edge_calibration import reestimate_batchnorm


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 2, 1)
    )


def test_statistics_are_those_of_the_whole_set() -> None:
    model, images = network().double(), torch.randn(40, 3, 6, 6, dtype=torch.float64) * 3 + 1
    with torch.no_grad():
        features = model[0](images)
    reestimate_batchnorm(model, images.split(8))
    # equal batches: the mean of their means is the mean; float64 rounding only
    torch.testing.assert_close(model[1].running_mean, features.mean((0, 2, 3)), rtol=1e-12, atol=1e-12)
    variances = torch.stack([f.transpose(0, 1).flatten(1).var(dim=1) for f in features.split(8)])
    torch.testing.assert_close(model[1].running_var, variances.mean(0), rtol=1e-12, atol=0)
    assert model[1].num_batches_tracked == 5

    reestimate_batchnorm(model, [images])
    torch.testing.assert_close(
        model[1].running_var, features.transpose(0, 1).flatten(1).var(dim=1), rtol=1e-12, atol=1e-12
    )


def test_earlier_statistics_are_forgotten() -> None:
    model, images = network(), torch.randn(16, 3, 6, 6)
    reestimate_batchnorm(model, images.split(4))
    once = model[1].running_mean.clone()
    model[1].running_mean.fill_(1e6)
    reestimate_batchnorm(model, images.split(4))
    assert torch.equal(model[1].running_mean, once)


def test_everything_else_stays() -> None:
    model = network().train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    reestimate_batchnorm(model, torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1)).split(4))
    assert torch.equal(torch.get_rng_state(), random_state)  # dropout was off
    assert [m.training for m in model] == [True, False, True, True, True]
    assert model[1].momentum == 0.3
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_modes_and_momentum_come_back_after_an_error() -> None:
    model = network().train()
    with pytest.raises(RuntimeError):
        reestimate_batchnorm(model, [torch.randn(8, 5, 6, 6)])
    assert model[1].momentum == 0.3 and all(m.training for m in model.modules())


def test_networks_without_running_statistics_are_not_run() -> None:
    for model in (nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, track_running_stats=False)):
        batches = iter([torch.zeros(2, 1, 3, 3)])
        reestimate_batchnorm(model, batches)
        assert len(list(batches)) == 1, "a batch was read"


def test_no_batches() -> None:
    model = network()
    before = model[1].running_var.clone()
    with pytest.raises(ValueError, match="at least one batch"):
        reestimate_batchnorm(model, [])
    assert torch.equal(model[1].running_var, before)
