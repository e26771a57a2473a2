"""An independent witness: reads SM clocks and power limits through NVML's own C functions and knows nothing of powerd.

House rules: it only reads; it speaks to whatever ``libnvidia-ml.so.1`` the loader finds, as any other tool would.
"""

from __future__ import annotations

import ctypes
import sys
import time

from powerd.demo.children import say

_SM_CLOCK = 1
PERIOD_S = 0.005
REPEAT_S = 0.25


class NvmlReader:
    """SM clocks in MHz and power limits in mW of the first GPUs."""

    def __init__(self, gpus: int) -> None:
        self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        self._check(self._nvml.nvmlInit_v2())
        self._devices = []
        for index in range(gpus):
            device = ctypes.c_void_p()
            self._check(self._nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)))
            self._devices.append(device)

    @staticmethod
    def _check(code: int) -> None:
        if code != 0:
            raise OSError(f"NVML error {code}")

    def clocks_mhz(self) -> list[int]:
        """The present SM clock of each GPU."""
        value = ctypes.c_uint()
        found = []
        for device in self._devices:
            self._check(self._nvml.nvmlDeviceGetClockInfo(device, _SM_CLOCK, ctypes.byref(value)))
            found.append(value.value)
        return found

    def limits_mw(self) -> list[int]:
        """The power limit of each GPU."""
        value = ctypes.c_uint()
        found = []
        for device in self._devices:
            self._check(self._nvml.nvmlDeviceGetPowerManagementLimit(device, ctypes.byref(value)))
            found.append(value.value)
        return found


def main() -> None:
    """A line per change, and now and then without one, until it is ended."""
    reader = NvmlReader(int(sys.argv[1]))
    before: object = None
    said_s = 0.0
    while True:
        now = (reader.clocks_mhz(), reader.limits_mw())
        if now != before or time.monotonic() - said_s > REPEAT_S:
            say(monotonic_ns=time.monotonic_ns(), clocks_mhz=now[0], limits_mw=now[1])
            before, said_s = now, time.monotonic()
        time.sleep(PERIOD_S)


if __name__ == "__main__":
    main()
