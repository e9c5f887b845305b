"""The plugin: which observer it makes, and its warning about skipped batches."""

import warnings

import pytest
import torch

from compression_manager.quantization import QuantizationScheme, QuantizationSite
from compression_plugins.calibration import (
    CalibrationConfig,
    CalibrationPlugin,
    MinMaxObserver,
    MovingAverageObserver,
)

SCHEME = QuantizationScheme(8, False)
ACTIVATION = QuantizationSite("conv1", "activation")
WEIGHT = QuantizationSite("conv1", "weight")


def test_kinds_follow_the_role():
    plugin = CalibrationPlugin(CalibrationConfig(averaging_constant=0.25))
    observer = plugin.make_observer(SCHEME, ACTIVATION)
    assert isinstance(observer, MovingAverageObserver)
    assert observer.averaging_constant == 0.25
    assert isinstance(plugin.make_observer(SCHEME, WEIGHT), MinMaxObserver)
    other = CalibrationPlugin(
        CalibrationConfig(observer="min_max", weight_observer="moving_average")
    )
    assert isinstance(other.make_observer(SCHEME, ACTIVATION), MinMaxObserver)
    assert isinstance(other.make_observer(SCHEME, WEIGHT), MovingAverageObserver)


def test_buffers_have_their_final_shape_and_device():
    plugin = CalibrationPlugin(CalibrationConfig())
    scheme = QuantizationScheme(granularity="channel", axis=1)
    site = QuantizationSite("conv1", "activation", 7, torch.device("meta"))
    buffers = dict(plugin.make_observer(scheme, site).named_buffers())
    assert {name: tuple(value.shape) for name, value in buffers.items()} == {
        "minimum": (7,),
        "maximum": (7,),
        "first_minimum": (7,),
        "first_maximum": (7,),
        "batches_observed": (),
        "batches_skipped": (),
    }
    assert {value.device.type for value in buffers.values()} == {"meta"}


def test_is_registered_under_its_name():
    from importlib.metadata import entry_points

    (found,) = entry_points(group="compression_manager.plugins.v1", name="calibration")
    assert found.load() is CalibrationPlugin


@pytest.mark.parametrize("event", ["on_epoch_end", "on_train_end"])
def test_skipped_batches_are_reported_once_per_layer(event):
    plugin = CalibrationPlugin(CalibrationConfig())
    first = plugin.make_observer(SCHEME, ACTIVATION)
    second = plugin.make_observer(SCHEME, QuantizationSite("conv2", "activation"))
    bad = torch.tensor([float("nan")])
    getattr(plugin, event)()
    first.observe(bad)
    first.observe(bad)
    with pytest.warns(UserWarning, match=r"calibration: .*layer 'conv1' \(2\)\. Check") as caught:
        getattr(plugin, event)()
    assert len(caught) == 1
    assert "conv2" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first.observe(bad)
        getattr(plugin, event)()
    second.observe(bad)
    with pytest.warns(UserWarning, match=r"layer 'conv2' \(1\)"):
        getattr(plugin, event)()


@pytest.mark.parametrize("synchronize", [True, False])
def test_every_observer_learns_whether_ranks_synchronize(synchronize):
    plugin = CalibrationPlugin(CalibrationConfig(synchronize=synchronize))
    for site in (ACTIVATION, WEIGHT):
        assert plugin.make_observer(SCHEME, site).synchronize is synchronize
