"""The sampler on an NVML of our own, each of its calls missing or failing in turn."""

import itertools
import json
import sys
import time
from types import SimpleNamespace

import pynvml
import pytest
import torch

from benchmarks import conftest, nvml, report
from benchmarks.nvml import POWER_CAP, THROTTLED, Gpu, Sampler


class NotSupported(Exception):
    pass


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(nvml, "_said", set())


class FakeNVML:
    """Each look finds the next of `reasons`, and 10 W more than the last."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, reasons, millijoules):
        self.reasons, self.millijoules, self.milliwatts = iter(reasons), millijoules, 90_000

    def nvmlDeviceGetClockInfo(self, handle, clock):
        return {1: 1980, 2: 2619}[clock]

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return 61

    def nvmlDeviceGetPowerUsage(self, handle):
        self.milliwatts += 10_000
        return self.milliwatts

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        return next(self.reasons)

    def nvmlDeviceGetMigMode(self, handle):
        raise NotSupported

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        return 700_000

    def nvmlSystemGetDriverVersion(self):
        return "570.1"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if self.millijoules is None:
            raise NotSupported
        return self.millijoules.pop(0)


def sampled(*reasons, millijoules=None):
    """A sampler that looked once a reason, a second apart."""
    seconds = iter(range(100))
    gpu = Gpu("gpu", FakeNVML(reasons, millijoules))
    with Sampler(gpu, now=lambda: next(seconds), every=3600) as sampler:
        for _ in reasons[2:]:  # it looks at the beginning and at the end by itself
            sampler.look()
    return sampler


def test_thread_looks_until_the_end():
    with Sampler(Gpu("gpu", FakeNVML(itertools.repeat(0), [0, 1000])), every=0.01) as sampler:
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


READ = {  # by the call that gives it: the facts that are None without
    "nvmlDeviceGetClockInfo": {"sm_mhz", "memory_mhz"},
    "nvmlDeviceGetTemperature": {"celsius_max"},
    "nvmlDeviceGetPowerUsage": set(),  # there is the energy
    "nvmlDeviceGetTotalEnergyConsumption": set(),  # there is the power
    "nvmlDeviceGetCurrentClocksEventReasons": {"power_capped", "throttled"},
    "nvmlDeviceGetEnforcedPowerLimit": {"limit"},
    "nvmlSystemGetDriverVersion": {"driver"},
}
EVERY = {
    "sm_mhz", "memory_mhz", "celsius_max", "power_capped", "throttled", "limit", "driver", "watts",
    "images_per_joule",
}  # fmt: skip


def without(*calls, missing=False):
    """An NVML of which these calls raise, or which does not have them."""
    fake = FakeNVML(itertools.repeat(0), [0, 1000, 2000, 3000])

    def refused(*given):
        raise RuntimeError("GPU is lost")

    class Less:
        def __getattr__(self, name):
            if name in calls:
                if missing:
                    raise AttributeError(name)
                return refused
            return getattr(fake, name)

    return Less()


def facts_of(gpu):
    """All that can be known of a GPU; after a thread has looked at it for a while."""
    with Sampler(gpu, every=0.005) as sampler:
        time.sleep(0.05)
    assert len(sampler.samples) >= 4  # the thread has looked on
    facts = sampler.clocks() | sampler.power(16)
    return facts | {"limit": gpu.limit_watts(), "driver": gpu.driver()}


def nones(facts):
    assert json.loads(json.dumps(facts)) == facts
    return {name for name, value in facts.items() if value is None}


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("call", READ)
def test_what_cannot_be_read_is_none_and_said_once(call, missing, capsys):
    gpu = Gpu("gpu", without(call, missing=missing))
    for _ in range(2):
        assert nones(facts_of(gpu)) == READ[call]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("NVML cannot read ")
    throttle = "nvmlDeviceGetCurrentClocksThrottleReasons"  # the older name, tried last
    last = throttle if "Reasons" in call else call
    assert (last if missing or last == throttle else "RuntimeError: GPU is lost") in lines[0]


def test_neither_energy_nor_power():
    gpu = Gpu("gpu", without("nvmlDeviceGetPowerUsage", "nvmlDeviceGetTotalEnergyConsumption"))
    assert nones(facts_of(gpu)) == {"watts", "images_per_joule"}


def test_an_older_driver_has_the_reasons_by_another_name(capsys):
    fake = without("nvmlDeviceGetCurrentClocksEventReasons")
    fake.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: 0x40
    assert facts_of(Gpu("gpu", fake))["throttle_reasons"] == ["hardware thermal slowdown"]
    assert not capsys.readouterr().err


def test_an_error_in_the_middle_loses_one_look():
    fake = FakeNVML(itertools.repeat(0), [0, 1000])
    answers = iter([61, RuntimeError("GPU is lost")])

    def temperature(handle, sensor):
        answer = next(answers, 70)
        if isinstance(answer, Exception):
            raise answer
        return answer

    fake.nvmlDeviceGetTemperature = temperature
    assert facts_of(Gpu("gpu", fake))["celsius_max"] == 70


def test_a_part_of_a_gpu_has_no_watts_of_its_own(capsys):
    fake = FakeNVML(itertools.repeat(0), [0, 1000])
    fake.nvmlDeviceGetMigMode = lambda handle: [1, 1]
    assert nones(facts_of(Gpu("gpu", fake))) == {"watts", "images_per_joule"}
    assert "MIG" in capsys.readouterr().err


@pytest.fixture
def found(monkeypatch):
    """Gpu.of with these of NVML's ways to find a GPU."""

    def by(**calls):
        def refused(*given):
            raise RuntimeError("Not Found")

        names = ("nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetHandleByPciBusId",
                 "nvmlDeviceGetHandleByIndex")  # fmt: skip
        fake = dict.fromkeys(names, refused) | {"nvmlInit": lambda: None}
        fake["nvmlDeviceGetCount"] = lambda: 1
        monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(**fake | calls))
        own = SimpleNamespace(uuid="12-34", pci_domain_id=0, pci_bus_id=0xAB, pci_device_id=1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: own)
        return Gpu.of(torch.device("cuda"))._handle

    return by


def test_a_gpu_is_found_by_uuid_else_by_bus_else_where_it_is_alone(found, capsys):
    def same(given):
        return given

    uuid, bus, index = (
        {f"nvmlDeviceGetHandleBy{how}": same} for how in ("UUID", "PciBusId", "Index")
    )
    assert found(**uuid, **bus, **index) == "GPU-12-34"
    assert found(**bus, **index) == "00000000:ab:01.0"
    assert found(**index) == 0
    assert not capsys.readouterr().err
    assert found(**index, nvmlDeviceGetCount=lambda: 2) is None
    assert "none of 2 GPUs" in capsys.readouterr().err


@pytest.mark.parametrize("absent", ["module", "driver", "card"])
def test_without_nvml_everything_is_none_and_said_once(absent, found, monkeypatch, capsys):
    def refused():
        raise RuntimeError("NVML Shared Library Not Found")

    assert found(**({"nvmlInit": refused} if absent == "driver" else {})) is None
    if absent == "module":
        monkeypatch.setattr(nvml, "_said", set())
        monkeypatch.setitem(sys.modules, "pynvml", None)
    capsys.readouterr()
    for _ in range(2):
        assert nones(facts_of(Gpu.of(torch.device("cuda")))) == EVERY
    assert len(capsys.readouterr().err.splitlines()) == (1 if absent == "module" else 0)


def test_a_run_is_saved_and_reported_without_any_of_it(mini, monkeypatch, tmp_path):
    """Its machine, and a step of which nothing could be read."""
    device = torch.device("cuda")
    monkeypatch.setattr(conftest, "DEVICE", device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    (path,) = mini[1].rglob("*.json")
    run = json.loads(path.read_text())
    conftest.pytest_benchmark_update_machine_info(None, run["machine_info"])
    assert (run["machine_info"]["driver"], run["machine_info"]["power_limit_watts"]) == (None, None)
    for entry in run["benchmarks"]:
        entry["extra_info"] |= dict.fromkeys(EVERY)
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert report.main(["--storage", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.md").read_text()
    assert "device Some GPU" in page
    assert "THROTTLED" not in page
    assert "None" not in page
