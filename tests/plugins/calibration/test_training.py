"""Every calibration in training, up to the converted model."""

import pytest
import torch

import toys
from compression_manager import prepare_compression
from compression_manager.quantization import (
    Calibration,
    HistogramCalibration,
    MinMaxCalibration,
    Observer,
    QuantizationScheme,
    QuantizationSite,
    RangeObserver,
)
from compression_plugins import QATConfig
from compression_plugins.calibration import CalibrationConfig
from observer_reference import CALIBRATIONS
from quantization_reference import step

WEIGHT = QuantizationScheme(bits=4, granularity="channel")


def build(kind):
    torch.manual_seed(0)
    model = toys.mlp()
    calibration = CALIBRATIONS[kind]
    on_weights = HistogramCalibration() if kind == "kl_divergence" else calibration
    activation = QuantizationScheme(4, symmetric=False, signed=False)
    manager = prepare_compression(
        model,
        [
            QATConfig(weight=WEIGHT, activation=activation),
            CalibrationConfig(observer=calibration, weight_observer=on_weights),
        ],
    )
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    return manager, optimizer


def batch(index):
    size = toys.mlp()[0].in_features
    return torch.randn(8, size, generator=torch.Generator().manual_seed(index)) * (1 + index)


@pytest.mark.parametrize("kind", list(CALIBRATIONS))
def test_converts_with_what_was_trained(kind):
    whole, optimizer = build(kind)
    for index in range(4):
        step(whole, batch(index), index, optimizer)
    whole.model.eval()
    with torch.no_grad():
        trained = whole.model(batch(9))
        served = whole.convert(batch(9))(batch(9))
    torch.testing.assert_close(served, trained, rtol=1e-4, atol=1e-5)
    whole.close()


@pytest.mark.parametrize("kind", list(CALIBRATIONS))
def test_another_prepared_model_takes_the_observers_over(kind):
    first, optimizer = build(kind)
    for index in range(2):
        step(first, batch(index), index, optimizer)
    second, _ = build(kind)
    second.model.load_state_dict(first.model.state_dict())
    for mine, theirs in zip(second.model.modules(), first.model.modules(), strict=True):
        if isinstance(theirs, RangeObserver):
            pairs = zip(mine.observed_range(), theirs.observed_range(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
            assert mine.batches_observed == theirs.batches_observed
    assert second.model[0].input_quantizer.observer.batches_observed == 2
    first.close()
    second.close()


class Fixed(Observer):
    def observe(self, input: torch.Tensor) -> None: ...

    def compute_range(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(-1.0), torch.tensor(1.0)

    def observed_range(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(-1.0), torch.tensor(1.0)

    def has_observed(self) -> bool:
        return True


class FixedCalibration(Calibration):
    """Stands for a third party's."""

    def make_observer(self, scheme: QuantizationScheme, site: QuantizationSite) -> Observer:
        return Fixed()


def test_own_calibrations_are_taken():
    manager = prepare_compression(
        toys.mlp(),
        [QATConfig(), CalibrationConfig(observer=FixedCalibration())],
    )
    layer = manager.model[0]
    assert isinstance(layer.input_quantizer.observer, Fixed)
    assert type(layer.weight_quantizer.observer) is type(
        MinMaxCalibration().make_observer(WEIGHT, QuantizationSite("0", "weight", 1))
    )
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    step(manager, batch(0))
    manager.on_epoch_end()
    assert layer.input_quantizer.quantization_parameters().scale == 2 / 255
    manager.close()
