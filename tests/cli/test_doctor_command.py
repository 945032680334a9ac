"""``transformers-kt doctor``: facts are the system's, forecasts follow from what is measured, advice has a cause."""

from __future__ import annotations

import importlib.metadata
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from fake_gpus import fake_gpus
from typer.testing import CliRunner

import transformers_kt
import transformers_kt._C as _C
from transformers_kt import plan
from transformers_kt.assets import bundled_model
from transformers_kt.cli import build_app, doctor
from transformers_kt.cli import machine as facts
from transformers_kt.cli.doctor import Diagnosis, Forecast, Speeds, diagnose
from transformers_kt.cli.machine import Machine, Rate, machine
from transformers_kt.errors import InputError

MODEL = bundled_model().name
READS = [Rate(1, 10e9), Rate(2, 19.5e9), Rate(4, 20e9)]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Speeds:
    """What the machine seems to do, so that no test waits for it."""
    monkeypatch.setattr(doctor, "read_rates", lambda: READS)
    monkeypatch.setattr(doctor, "DecodeRates", lambda: SimpleNamespace(sample=lambda: [18e9]))
    monkeypatch.setattr(doctor, "product_rate", lambda: 4e11)
    monkeypatch.setattr(doctor, "_measured", lambda model: 1000.0)
    return Speeds(READS, 18e9, 4e11, 1e-3 - plan(bundled_model(), gpus=[]).devices[0].read_per_token / 18e9)


@pytest.fixture
def here() -> Machine:
    """A machine with which all is well."""
    return replace(machine(), isa="avx512_vnni", isas=("avx512_vnni",), cores=4, cpus=4, all_cpus=4, quota=0.0,
                   huge_pages="madvise", swap_used=0, packages=(), gpus=(), hand_offs=())  # fmt: skip


def run(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(build_app(), ["doctor", *args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def test_facts_are_those_of_the_system() -> None:
    found = machine()
    assert found.ram == psutil.virtual_memory().total
    assert found.cpus == len(os.sched_getaffinity(0))
    assert found.threads == transformers_kt.thread_count()
    assert found.isas[0] == _C.supported_isas()[0]
    versions = {package.name: package.version for package in found.packages}
    assert versions["torch"] == importlib.metadata.version("torch")
    assert all(package.fits for package in found.packages)
    assert "pytest" not in versions  # of an extra


def test_a_version_out_of_range_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["numpy>=1000", "no-such-package>=1", 'pytest>=8; extra == "test"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    numpy, missing = machine().packages
    assert (numpy.fits, missing.fits, missing.version) == (False, False, None)


def test_gpus_are_those_that_nvidia_smi_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\necho 'Some GPU, 570.1, 24564, 24000, 4, 16'\necho 'Other, 570.1, 8192, 8000, 3, 8'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    first, second = machine().gpus
    assert (first["name"], first["free_mib"], first["pcie_lanes"]) == ("Some GPU", "24000", "16")
    assert second["driver"] == "570.1"
    program.write_text("#!/bin/sh\nexit 9\n")
    assert machine().gpus == ()


def test_the_hand_off_in_use_is_told() -> None:
    with fake_gpus("24GiB", "8GiB"):
        first, second = (text for name, text in doctor._facts(machine()) if name == "hand-off")
    assert first.startswith("cuda:0 is a fake")
    assert second.startswith("cuda:1 is a fake")


@pytest.mark.parametrize(
    ("hand_offs", "said", "advice"),
    [
        ((), "none: this torch sees no GPU", "torch sees no GPU"),
        ((facts.HandOff("cuda:0", False, False),), "cuda:0 runs layers as torch operations", "triton is missing"),
        ((facts.HandOff("cuda:0", False, True),), "cuda:0 runs layers as kernels of Triton", None),
    ],
)
def test_a_gpu_that_is_not_used_well_is_told(here: Machine, hand_offs: Any, said: str, advice: str | None) -> None:
    gpu = dict.fromkeys(("name", "driver", "total_mib", "free_mib", "pcie_generation", "pcie_lanes"), "1")
    found = replace(here, gpus=(gpu,), hand_offs=hand_offs)
    assert said in dict(doctor._facts(found))["hand-off"]
    assert [text for text in doctor._advice(found, None) if advice is None or advice not in text] == []
    assert len([*doctor._advice(found, None)]) == (advice is not None)


def test_every_number_of_threads_is_measured_up_to_that_of_the_cpus(eight_cpus: None) -> None:
    class Memory:
        def bandwidth(self, cpus: list[int]) -> float:
            return float(len(cpus))

    facts_of = pytest.MonkeyPatch()
    with facts_of.context() as patch:
        patch.setattr(facts, "ReadableMemory", Memory)
        assert facts.read_rates() == [Rate(count, float(count)) for count in (1, 2, 4, 8)]


def test_bandwidth_products_and_disk_are_measured(tmp_path: Path) -> None:
    # Floors that a machine under any load passes, and that a wrong unit misses by a thousand.
    (rate, *_) = facts.read_rates()
    assert 1e8 < rate.bytes_per_s < 1e12
    assert 1e7 < min(facts.DecodeRates().sample()) < 1e12
    assert 1e8 < facts.product_rate() < 1e14
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    assert (facts.disk_rate(file) or 0) > 1e5


def test_the_forecast_is_the_time_to_read_the_weights_and_that_of_all_else(measured: Speeds) -> None:
    (cpu,) = plan(bundled_model(), gpus=[]).devices
    found = diagnose(MODEL).model
    assert found is not None
    assert found.expected == pytest.approx(1000)  # what the bundled model was measured to do
    assert measured.tokens_per_s(1_800_000_000) == pytest.approx(1 / (0.1 + measured.overhead_s))
    assert found.limit == pytest.approx(20e9 / cpu.read_per_token)
    assert measured.threads_enough == 2


def test_it_ends_in_sentences(measured: Speeds, here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "machine", lambda: replace(here, ram=24_000_000_000))
    code, said = run()
    assert code == 0
    assert "2 threads reach 95% of this machine's bandwidth, 20.0 GB/s; more will not help decoding." in said
    assert "Q4_K_M would decode at about 11.1 tokens/s." in said
    assert "Q4_K_M would decode at about 0.807 tokens/s, with 382 GB more RAM." in said
    assert "VNNI" not in said.replace("vnni", "")


def test_what_an_instruction_set_would_bring_is_said_where_it_is_missing(
    measured: Speeds, here: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "machine", lambda: replace(here, isa="avx2", isas=("avx2", "scalar")))
    said = run()[1]
    assert "avx512_vnni would bring prompts in half the time" in " ".join(said.split())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"isa": "avx2", "isas": ("avx512", "avx2")}, "TRANSFORMERS_KT_ISA asks for avx2"),
        ({"all_cpus": 8}, "only 4 of 8 CPUs may be used"),
        ({"quota": 1.5}, "leaves 1.5 CPUs of 4 cores"),
        ({"huge_pages": "never"}, "huge pages are off"),
        ({"swap_used": 2 << 30}, "2.15 GB are swapped out"),
        ({"packages": (facts.Package("torch", "2.5", ">=2.6", False),)}, "pip install 'torch>=2.6'"),
    ],
)
def test_what_is_wrong_is_said_and_ends_with_3(
    measured: Speeds, here: Machine, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], said: str
) -> None:
    assert [*doctor._advice(here, None)] == []
    monkeypatch.setattr(doctor, "machine", lambda: replace(here, **change))
    code, printed = run()
    assert code == 3
    assert f"To change: {said}" in " ".join(printed.split()) or said in " ".join(printed.split())


def test_a_model_too_large_or_too_slow_is_told(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Forecast("m", needed=2 * here.free_ram, read_per_token=1, expected=10.0, limit=12.0, measured=5.0)
    large, slow = doctor._advice(here, model)
    assert "m needs" in large
    assert "m decodes at 50% of what is expected" in slow
    monkeypatch.setattr(os, "getloadavg", lambda: (9.0, 9.0, 9.0))
    assert "load 9.0 on 4" in [*doctor._advice(here, model)][1]


def test_json_holds_all_of_it_and_a_picture_is_written(measured: Speeds, tmp_path: Path) -> None:
    picture = tmp_path / "bandwidth.png"
    said = json.loads(run(MODEL, "--run", "--json", "--png", str(picture))[1])
    assert said["speeds"]["reads"] == [list(rate) for rate in READS]
    assert said["model"]["measured"] == 1000
    assert picture.stat().st_size > 1000


def test_a_picture_that_cannot_be_written_and_a_run_without_model_are_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "diagnose", None)
    with pytest.raises(InputError, match="picture"):
        run("--png", "x.foo")
    assert run("--run")[0] == 2


def test_a_diagnosis_says_the_same_in_text_and_json(measured: Speeds, here: Machine) -> None:
    found = Diagnosis(here, measured, None, ["All is well."], ["nothing."])
    assert str(found).endswith("All is well.\nTo change: nothing.")
    assert found.to_dict()["sentences"] == ["All is well."]
