"""What a wheel holds for each CMake option, and what it then says of itself."""

from __future__ import annotations

import json

import pytest

PACKAGE = "flash_sparse_attn"
CUDA_OFF = {"FSA_BUILD_CUDA": "OFF"}

# CMake takes these for what it found, whatever the machine that runs the tests has.
NO_NVCC = {"FSA_NVCC": ""}
NO_GPU = {"FSA_NVIDIA_SMI": ""}


def backends_in(files: set[str]) -> set[str]:
    prefix = f"{PACKAGE}/backends/"
    inside = [path.removeprefix(prefix) for path in files if path.startswith(prefix)]
    return {path.partition("/")[0] for path in inside if "/" in path}


def test_default_wheel_holds_every_part(build, tree):
    built = build(**CUDA_OFF)
    assert built.status == 0, built.output
    files = built.files()
    assert {"cute", "triton"} <= backends_in(files)
    places = {
        "python/flash_sparse_attn": PACKAGE,
        "spec": f"{PACKAGE}/spec",
        "reference": f"{PACKAGE}/reference",
        "backends/triton": f"{PACKAGE}/backends/triton",
    }
    for source, place in places.items():
        paths = [path for path in (tree / source).rglob("*") if path.suffix in {".py", ".toml"}]
        assert paths
        for path in paths:
            assert f"{place}/{path.relative_to(tree / source).as_posix()}" in files


def test_wheel_runs_on_its_own(build):
    built = build(**CUDA_OFF)
    told = built.python("-c", f"import {PACKAGE} as p; print(p.__file__, p.__version__)")
    assert told.startswith(str(built.folder))
    assert (
        json.loads(built.python("-m", PACKAGE, "info", "--json"))["versions"]["flash-sparse-attn"]
        == (told.split()[1])
    )


def test_wheel_holds_no_sources_of_compiled_code(build):
    built = build(**CUDA_OFF)
    suffixes = (".cu", ".cuh", ".cpp", ".h", ".txt", ".md")
    names = {path for path in built.files() if path.startswith(f"{PACKAGE}/backends/")}
    assert {name for name in names if name.endswith(suffixes)} == {f"{PACKAGE}/backends/order.txt"}
    assert not [path for path in built.files() if path.endswith("CMakeLists.txt")]


@pytest.mark.parametrize("backend", ["cute", "triton"])
def test_backend_switched_off_is_not_in_the_wheel(build, backend):
    option = f"FSA_BUILD_{backend.upper()}"
    built = build(**CUDA_OFF, **{option: "OFF"})
    assert built.status == 0, built.output
    assert backends_in(built.files()) == {"cute", "triton"} - {backend}
    told = json.loads(built.python("-m", PACKAGE, "info", "--json"))
    assert backend not in told["available_backends"]
    assert told["backends"][backend]["build_option"] == {option: "OFF"}
    assert f"{option}=OFF" in told["backends"][backend]["reasons"][0]


def test_automatic_cuda_is_left_out_with_every_reason_where_there_is_no_toolkit(build):
    built = build(FSA_BUILD_CUDA="AUTO", **NO_NVCC, **NO_GPU)
    assert built.status == 0, built.output
    assert "cuda" not in backends_in(built.files())
    told = json.loads(built.python("-m", PACKAGE, "info", "--json"))["backends"]["cuda"]
    assert told["build_option"] == {"FSA_BUILD_CUDA": "AUTO"}
    for reason in ("no CUDA compiler (nvcc) found", "no NVIDIA GPU found"):
        assert f"it is not in this build, FSA_BUILD_CUDA=AUTO: {reason}" in told["reasons"]


def test_cuda_on_fails_without_a_compiler(build):
    built = build(FSA_BUILD_CUDA="ON", **NO_NVCC)
    said = " ".join(built.output.split())
    assert built.status != 0
    assert "FSA_BUILD_CUDA=ON, but the cuda backend cannot be built: " in said
    assert "no CUDA compiler (nvcc) found" in said


def test_cuda_on_fails_while_there_are_no_kernels(build, tree):
    assert not list((tree / "backends" / "cuda").rglob("*.cu"))
    built = build(FSA_BUILD_CUDA="ON", FSA_NVCC="/usr/bin/nvcc")
    assert built.status != 0
    assert "cannot be built: the CUDA backend has no kernels yet" in " ".join(built.output.split())


def test_unknown_setting_fails(build):
    built = build(FSA_BUILD_TRITON="AUTO")
    assert built.status != 0
    assert "FSA_BUILD_TRITON=AUTO: expected one of ON" in " ".join(built.output.split())


def test_listed_backend_without_a_folder_fails(build, tree):
    order = tree / "backends" / "order.txt"
    order.write_text(order.read_text() + "metal\n")
    built = build()
    assert built.status != 0
    assert "lists metal, but there is no folder" in " ".join(built.output.split())
