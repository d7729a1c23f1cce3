"""What the GPU does while it is timed, by NVML: clocks, temperature, power, energy, and whether it
was throttled. A thread looks every 20 ms. What NVML cannot read is None, and is said once on the
standard error: no measurement depends on it. Not here: timing."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
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


_said: set[str] = set()


class Gpu:
    """One GPU as NVML knows it.

    Args:
        handle: NVML's, of the GPU.
        nvml: the module `pynvml`, already initialised; another one in tests; None: there is none,
            and everything is None.
    """

    def __init__(self, handle: Any, nvml: Any) -> None:
        self._handle, self._nvml = handle, nvml
        # Where a GPU is divided (MIG), watts are those of the whole, and say nothing of a part.
        self._divided = False
        if nvml is not None:
            with contextlib.suppress(Exception):  # most GPUs cannot be divided
                self._divided = nvml.nvmlDeviceGetMigMode(handle)[0] == 1

    @classmethod
    def of(cls, device: Any) -> "Gpu":
        """That of a torch CUDA device. It is found by its UUID or its place on the PCI bus, because
        CUDA_VISIBLE_DEVICES renumbers what torch sees and not what NVML sees."""
        import torch

        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception as error:
            _say("the GPU", error)
            return cls(None, None)
        own = torch.cuda.get_device_properties(device)
        why: Exception | None = None
        for find in (
            lambda: pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{own.uuid}"),
            lambda: pynvml.nvmlDeviceGetHandleByPciBusId(
                f"{own.pci_domain_id:08x}:{own.pci_bus_id:02x}:{own.pci_device_id:02x}.0"
            ),
            lambda: _only(pynvml),
        ):
            try:
                return cls(find(), pynvml)
            except Exception as error:
                why = error
        _say("the GPU", why)
        return cls(None, None)

    def sm_mhz(self) -> int | None:
        """Clock of the multiprocessors."""
        return self._read("clocks", lambda n, h: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_SM))

    def memory_mhz(self) -> int | None:
        """Clock of the memory."""
        return self._read("clocks", lambda n, h: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_MEM))

    def celsius(self) -> int | None:
        """Temperature."""
        return self._read(
            "temperature", lambda n, h: n.nvmlDeviceGetTemperature(h, n.NVML_TEMPERATURE_GPU)
        )

    def watts(self) -> float | None:
        """Power now."""
        return self._power("power", lambda n, h: n.nvmlDeviceGetPowerUsage(h) / 1000)

    def joules(self) -> float | None:
        """Energy since the driver was loaded; cards before Volta do not count it."""
        return self._power("energy", lambda n, h: n.nvmlDeviceGetTotalEnergyConsumption(h) / 1000)

    def limit_watts(self) -> float | None:
        """The most power that it may take."""
        return self._read("power limit", lambda n, h: n.nvmlDeviceGetEnforcedPowerLimit(h) / 1000)

    def reasons(self) -> int | None:
        """Bits: what holds the clocks down. Older drivers have it by the second name."""
        return self._read(
            "what holds the clocks down",
            lambda n, h: n.nvmlDeviceGetCurrentClocksEventReasons(h),
            lambda n, h: n.nvmlDeviceGetCurrentClocksThrottleReasons(h),
        )

    def driver(self) -> str | None:
        """Version of the driver."""
        return self._read("driver version", lambda n, h: n.nvmlSystemGetDriverVersion())

    def _power(self, what: str, call: Callable[[Any, Any], float]) -> float | None:
        if self._divided:
            _say(what, "the GPU is divided (MIG), and NVML knows that of the whole GPU alone")
            return None
        return self._read(what, call)

    def _read(self, what: str, *calls: Callable[[Any, Any], Any]) -> Any:
        """What the first of the calls that works gives, None where none does."""
        if self._nvml is None:
            return None
        why: Exception | None = None
        for call in calls:
            try:
                return call(self._nvml, self._handle)
            except Exception as error:  # of NVML, or its module is too old to have the function
                why = error
        _say(what, why)
        return None


def _only(nvml: Any) -> Any:
    """The one GPU that NVML sees: then it is torch's."""
    count = nvml.nvmlDeviceGetCount()
    if count != 1:
        raise LookupError(f"none of {count} GPUs has the UUID or the bus address that torch gives")
    return nvml.nvmlDeviceGetHandleByIndex(0)


def _say(what: str, why: object) -> None:
    """One line for each thing that cannot be read, once in a process."""
    if what not in _said:
        _said.add(what)
        kind = f"{type(why).__name__}: " if isinstance(why, Exception) else ""
        print(f"NVML cannot read {what}: {kind}{why}", file=sys.stderr, flush=True)


class Sample(NamedTuple):
    """One look: seconds, MHz, degrees Celsius, watts, bits. None: it cannot be read."""

    at: float
    sm_mhz: int | None
    memory_mhz: int | None
    celsius: int | None
    watts: float | None
    reasons: int | None


class Sampler:
    """Looks at one GPU while the `with` lasts.

    Args:
        gpu: the GPU.
        now: the clock, in seconds.
        every: seconds between two looks.
    """

    def __init__(
        self,
        gpu: Gpu,
        now: Callable[[], float] = time.monotonic,
        every: float = EVERY_SECONDS,
    ) -> None:
        self._gpu, self._now, self._every = gpu, now, every
        self.samples: list[Sample] = []
        self.joules: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="nvml", daemon=True)

    @classmethod
    def of(cls, device: Any) -> "Sampler":
        """A sampler of a torch CUDA device."""
        return cls(Gpu.of(device))

    def __enter__(self) -> "Sampler":
        self._before = self._gpu.joules()
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
        after = self._gpu.joules()
        if self._before is not None and after is not None:
            self.joules = after - self._before
        else:
            self.joules = self._integrated()

    @property
    def seconds(self) -> float:
        """From the first look to the last."""
        return self.samples[-1].at - self.samples[0].at

    def clocks(self) -> dict[str, Any]:
        """Clocks and temperature, and whether anything held them down at any look."""
        reasons, seen = _known(s.reasons for s in self.samples), 0
        for bits in reasons:
            seen |= bits
        why = [name for bit, name in THROTTLED.items() if seen & bit]
        return {
            "sm_mhz": _of(median, (s.sm_mhz for s in self.samples)),
            "memory_mhz": _of(median, (s.memory_mhz for s in self.samples)),
            "celsius_max": _of(max, (s.celsius for s in self.samples)),
            "power_capped": bool(seen & POWER_CAP) if reasons else None,
            "throttled": bool(why) if reasons else None,
            **({"throttle_reasons": why} if why else {}),
        }

    def power(self, images: int | None) -> dict[str, Any]:
        """Mean power, and images per joule of what ran meanwhile."""
        joules = self.joules
        facts: dict[str, Any] = {
            "watts": None if joules is None else round(joules / self.seconds, 1)
        }
        if images is not None:
            facts["images_per_joule"] = round(images / joules, 3) if joules else None
        return facts

    def look(self) -> None:
        """Takes one sample."""
        gpu = self._gpu
        self.samples.append(
            Sample(
                self._now(),
                gpu.sm_mhz(),
                gpu.memory_mhz(),
                gpu.celsius(),
                gpu.watts(),
                gpu.reasons(),
            )
        )

    def _loop(self) -> None:
        while not self._stop.wait(self._every):
            self.look()

    def _integrated(self) -> float | None:
        """Joules by the power at the looks that have it; None where fewer than two do."""
        power = [(s.at, s.watts) for s in self.samples if s.watts is not None]
        if len(power) < 2:
            return None
        return sum((t - s) * (v + w) / 2 for (s, v), (t, w) in pairwise(power))


def _known(values: Iterable[int | None]) -> list[int]:
    return [value for value in values if value is not None]


def _of(summary: Callable[[list[int]], float], values: Iterable[int | None]) -> float | None:
    """The median, say, of those that could be read; None where none could."""
    known = _known(values)
    return summary(known) if known else None
