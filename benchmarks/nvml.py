"""What the GPU does while it is timed, by NVML: clocks, temperature, power, energy, and whether it
was throttled. A thread looks every 20 ms. Not here: timing."""

import threading
import time
from collections.abc import Callable
from statistics import median
from types import TracebackType
from typing import Any, NamedTuple

EVERY_SECONDS = 0.02

# By NVML's names (nvmlClocksEventReason...). Heat, or a board that protects itself: such a run says
# nothing of the code, and is refused. A card at its power limit is as fast as that card gets, so
# that is told and no more.
THROTTLED = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}
POWER_CAP = 0x04


class Sample(NamedTuple):
    """One look: seconds, MHz, degrees Celsius, watts, bits."""

    at: float
    sm_mhz: int
    memory_mhz: int
    celsius: int
    watts: float
    reasons: int


class Sampler:
    """Looks at one GPU while the `with` lasts.

    Args:
        handle: NVML's, of the GPU.
        nvml: the module `pynvml`, already initialised; another one in tests.
        now: the clock, in seconds.
        every: seconds between two looks.
    """

    def __init__(
        self,
        handle: Any,
        nvml: Any,
        now: Callable[[], float] = time.monotonic,
        every: float = EVERY_SECONDS,
    ) -> None:
        self.handle, self._nvml, self._now, self._every = handle, nvml, now, every
        self.samples: list[Sample] = []
        self.joules = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="nvml", daemon=True)

    @classmethod
    def of(cls, device: Any) -> "Sampler":
        """A sampler of a torch CUDA device; found by its UUID, because CUDA_VISIBLE_DEVICES
        renumbers what torch sees and not what NVML sees."""
        import pynvml
        import torch

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return cls(pynvml.nvmlDeviceGetHandleByUUID(uuid), pynvml)

    def __enter__(self) -> "Sampler":
        self._before = self._energy()
        self.look()  # so that even the shortest `with` has one
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.look()
        after = self._energy()
        if self._before is not None and after is not None:
            self.joules = (after - self._before) / 1000
        else:  # before Volta there is no counter: the power, integrated
            self.joules = sum(
                (b.at - a.at) * (a.watts + b.watts) / 2
                for a, b in zip(self.samples, self.samples[1:], strict=False)
            )

    @property
    def seconds(self) -> float:
        """From the first look to the last."""
        return self.samples[-1].at - self.samples[0].at

    def clocks(self) -> dict[str, Any]:
        """Clocks and temperature, and whether anything held them down at any look."""
        seen = 0
        for sample in self.samples:
            seen |= sample.reasons
        why = [name for bit, name in THROTTLED.items() if seen & bit]
        return {
            "sm_mhz": median(s.sm_mhz for s in self.samples),
            "memory_mhz": median(s.memory_mhz for s in self.samples),
            "celsius_max": max(s.celsius for s in self.samples),
            "power_capped": bool(seen & POWER_CAP),
            "throttled": bool(why),
            **({"throttle_reasons": why} if why else {}),
        }

    def power(self, images: int | None) -> dict[str, Any]:
        """Mean power, and images per joule of what ran meanwhile."""
        facts: dict[str, Any] = {"watts": round(self.joules / self.seconds, 1)}
        if images is not None and self.joules:
            facts["images_per_joule"] = round(images / self.joules, 3)
        return facts

    def _loop(self) -> None:
        while not self._stop.wait(self._every):
            self.look()

    def look(self) -> None:
        """Takes one sample."""
        nvml, handle = self._nvml, self.handle
        self.samples.append(
            Sample(
                self._now(),
                nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
                nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
                nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
                nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
                nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
            )
        )

    def _energy(self) -> float | None:
        """Millijoules since the driver was loaded; None where the card does not count them."""
        try:
            energy: float = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)
        except self._nvml.NVMLError_NotSupported:
            return None
        return energy
