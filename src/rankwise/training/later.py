"""Numbers of a device that the host looks at later, so that it need not wait for them now."""

from __future__ import annotations

import torch
from torch import Tensor


class Later:
    """A copy of a small tensor on its way to the host.

    The host goes on while the device still works towards it. Who asks for it one step later finds it there: by then the
    device has a whole step queued behind it, and stands still for nobody.
    """

    def __init__(self, value: Tensor) -> None:
        # Memory that the operating system does not move: into any other, a device copies only while the host waits.
        self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        self._value.copy_(value, non_blocking=True)
        self._copied = torch.get_device_module(value.device).Event()
        self._copied.record()

    def value(self) -> Tensor:
        """The numbers, once they have arrived."""
        self._copied.synchronize()
        return self._value
