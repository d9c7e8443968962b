"""The registry of backends and what `python -m flash_sparse_attn info` tells of it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from flash_sparse_attn import __main__, info, registry

RECORD = "flash_sparse_attn.build_record"
TRITON_OFF = {"triton": ("OFF", ("switched off",))}
CUDA_AUTO = {"cuda": ("AUTO", ("no CUDA compiler (nvcc) found", "no NVIDIA GPU found"))}


@pytest.fixture
def build_record(monkeypatch):
    """Returns a function that puts a build record in place of this installation's own."""

    def put(backends):
        module = ModuleType(RECORD)
        module.BACKENDS, module.__spec__ = backends, ModuleSpec(RECORD, loader=None)
        monkeypatch.setitem(sys.modules, RECORD, module)
        registry.build_options.cache_clear()

    yield put
    monkeypatch.undo()
    registry.build_options.cache_clear()


def test_names_are_in_order_of_preference():
    assert registry.names() == ("cuda", "cute", "triton")


def test_unknown_name_is_an_error_that_lists_the_names():
    for ask in (registry.load, registry.availability):
        with pytest.raises(ValueError, match=r"'cud'.*'cuda', 'cute', 'triton', 'reference'.*E9"):
            ask("cud")


def test_without_a_record_every_backend_counts_as_on(build_record):
    build_record({})
    assert registry.build_options() == dict.fromkeys(
        registry.names(), registry.BuildOption("ON", ())
    )


def test_backend_switched_off_is_absent_and_info_says_so(build_record, capsys):
    build_record(TRITON_OFF)
    assert "triton" not in registry.get_available_backends()
    with pytest.raises(ImportError, match=r"FSA_BUILD_TRITON=OFF; with it: pip install -C .*=ON"):
        registry.load("triton")
    told = info.collect()["backends"]["triton"]
    assert told["build_option"] == {"FSA_BUILD_TRITON": "OFF"}
    assert told["info"] is None
    assert info.main([]) == 0
    assert told["reasons"][0] in capsys.readouterr().out


def test_every_reason_of_an_automatic_build_is_told(build_record):
    build_record(CUDA_AUTO)
    assert registry.availability("cuda") == [
        "it is not in this build, FSA_BUILD_CUDA=AUTO: no CUDA compiler (nvcc) found",
        "it is not in this build, FSA_BUILD_CUDA=AUTO: no NVIDIA GPU found",
    ]


def test_every_backend_is_available_or_has_a_reason():
    found = info.collect()
    assert list(found["backends"]) == [*registry.names(), registry.REFERENCE]
    without = [name for name, backend in found["backends"].items() if not backend["reasons"]]
    assert without == found["available_backends"] == registry.get_available_backends()
    assert without[-1] == registry.REFERENCE


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cuda", "the CUDA backend has no kernels yet"),
        ("cute", "the CuTe-DSL backend has no kernels yet"),
    ],
)
def test_declared_backend_says_that_it_has_no_kernels(build_record, name, reason):
    build_record({})
    backend = registry.load(name)
    assert registry.availability(name)[0] == reason
    assert backend.unsupported(problem=None) == [reason]
    for run in (backend.forward, backend.backward):
        with pytest.raises(NotImplementedError, match=reason):
            run(None, None)


def test_missing_package_of_a_declared_backend_is_a_reason(build_record, monkeypatch):
    build_record({})
    monkeypatch.setitem(sys.modules, "cutlass", None)
    assert registry.availability("cute")[1:] == [
        "the package 'cutlass' is not installed: pip install nvidia-cutlass-dsl"
    ]


def test_devices_are_told_with_capability_and_memory(monkeypatch):
    h200 = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=150 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: h200)
    assert info.devices() == [
        {
            "device": "cuda:0",
            "name": "NVIDIA H200",
            "capability": "9.0",
            "memory": 150 * 2**30,
        }
    ]
    found = {"versions": {}, "devices": info.devices(), "backends": {}}
    assert "NVIDIA H200, capability 9.0, 150.0 GiB" in info.render(found)


@pytest.mark.parametrize(
    ("status", "output", "version"), [(0, "580.65.06", "580.65.06"), (9, "no devices", None)]
)
def test_driver_version_is_that_of_nvidia_smi(tmp_path, monkeypatch, status, output, version):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho {output}\nexit {status}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert info.versions()["nvidia driver"] == version


def test_command_prints_what_collect_tells():
    command = [sys.executable, "-m", "flash_sparse_attn", "info", "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout) == json.loads(json.dumps(info.collect()))
    assert json.loads(answer.stdout)["versions"]["torch"]


def test_command_without_a_name_fails_and_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main([])
    assert stop.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_command_passes_its_arguments_on(monkeypatch):
    given = []
    monkeypatch.setattr(info, "main", lambda argv: given.append(argv) or 0)
    assert __main__.main(["info", "--json"]) == 0
    assert given == [["--json"]]


def test_every_command_is_a_module_of_the_package():
    for name in __main__.COMMANDS:
        assert (Path(__main__.__file__).parent / f"{name}.py").is_file()
