"""Where the tests of this folder run: `pytest tests/device --device cuda`, or on the simulated device by default.

A plugin for the test files that name it in `pytest_plugins`.
"""

from __future__ import annotations

import pytest
import torch

import simulated


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device under test; tests are skipped, with the reason, where it cannot be had."""
    name = request.config.getoption("--device")
    if name == simulated.NAME:
        reason = simulated.missing()
        if reason:
            pytest.skip(reason)
        simulated.register()
    elif not torch.get_device_module(name).is_available():
        pytest.skip(f"torch finds no device {name!r} here")
    return torch.device(name, 0)


@pytest.fixture(scope="session")
def simulated_device(device: torch.device) -> torch.device:
    """The simulated device, for tests of itself and of what it counts."""
    if device.type != simulated.NAME:
        pytest.skip("counts are those of the simulated device")
    return device
