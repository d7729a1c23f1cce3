"""The sampler on an NVML of our own."""

import itertools
import time

import pynvml
import pytest

from benchmarks.nvml import POWER_CAP, THROTTLED, Sampler


class NotSupported(Exception):
    pass


class FakeNVML:
    """Each look finds the next of `reasons`, and 10 W more than the last."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVMLError_NotSupported = NotSupported

    def __init__(self, reasons, millijoules):
        self.reasons, self.millijoules, self.milliwatts = iter(reasons), millijoules, 90_000

    def nvmlDeviceGetClockInfo(self, handle, clock):
        return {1: 1980, 2: 2619}[clock]

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return 61

    def nvmlDeviceGetPowerUsage(self, handle):
        self.milliwatts += 10_000
        return self.milliwatts

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return next(self.reasons)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if self.millijoules is None:
            raise NotSupported
        return self.millijoules.pop(0)


def sampled(*reasons, millijoules=None):
    """A sampler that looked once a reason, a second apart."""
    seconds = iter(range(100))
    nvml = FakeNVML(reasons, millijoules)
    with Sampler("gpu", nvml, now=lambda: next(seconds), every=3600) as sampler:
        for _ in reasons[2:]:  # it looks at the beginning and at the end by itself
            sampler.look()
    return sampler


def test_thread_looks_until_the_end():
    with Sampler("gpu", FakeNVML(itertools.repeat(0), [0, 1000]), every=0.01) as sampler:
        time.sleep(0.2)
    looks = len(sampler.samples)
    assert looks >= 4
    time.sleep(0.05)
    assert len(sampler.samples) == looks


def test_energy_is_the_counters_or_the_power_integrated():
    counted = sampled(0, 0, 0, millijoules=[5_000, 305_000])
    assert counted.joules == 300
    assert counted.power(600) == {"watts": 150.0, "images_per_joule": 2.0}  # 300 J in 2 s
    assert counted.power(None) == {"watts": 150.0}
    # 100, 110 and 120 W, a second apart: trapezoids of 105 and 115 J.
    assert sampled(0, 0, 0).joules == pytest.approx(220)


@pytest.mark.parametrize(
    ("reason", "throttled"),
    [
        (pynvml.nvmlClocksThrottleReasonGpuIdle, []),
        (pynvml.nvmlClocksThrottleReasonApplicationsClocksSetting, []),
        (pynvml.nvmlClocksThrottleReasonSwPowerCap, []),
        (pynvml.nvmlClocksThrottleReasonHwSlowdown, ["hardware slowdown"]),
        (pynvml.nvmlClocksThrottleReasonSwThermalSlowdown, ["software thermal slowdown"]),
        (pynvml.nvmlClocksThrottleReasonHwThermalSlowdown, ["hardware thermal slowdown"]),
        (pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown, ["hardware power brake"]),
    ],
)
def test_one_throttled_look_throttles_the_run(reason, throttled):
    facts = sampled(0, 0, reason, 0).clocks()
    assert facts["throttled"] is bool(throttled)
    assert facts.get("throttle_reasons", []) == throttled
    assert facts["power_capped"] is (reason == pynvml.nvmlClocksThrottleReasonSwPowerCap)
    assert (facts["sm_mhz"], facts["memory_mhz"], facts["celsius_max"]) == (1980, 2619, 61)


def test_power_cap_is_not_among_the_reasons_that_refuse():
    assert POWER_CAP not in THROTTLED
