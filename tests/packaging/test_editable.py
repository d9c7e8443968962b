"""An editable install reads the tree itself: sources live, options from its build record."""

from __future__ import annotations

import json

PACKAGE = "flash_sparse_attn"


def in_editable(built, code: str) -> str:
    """Run code where the editable build's .pth file is active."""
    return built.python("-c", f"import site; site.addsitedir({str(built.folder)!r})\n{code}")


PARTS = {
    "python/flash_sparse_attn": PACKAGE,
    "spec": f"{PACKAGE}.spec",
    "reference": f"{PACKAGE}.reference",
    "backends/triton": f"{PACKAGE}.backends.triton",
}
"""Folder of the tree -> the package that it is once installed."""


def test_new_module_of_every_part_is_seen_without_a_new_install(build, tree):
    built = build("build_editable")
    assert built.status == 0, built.output
    for folder in PARTS:
        (tree / folder / "added.py").write_text("")
    code = "".join(
        f"import {package}.added as m; print(m.__file__)\n" for package in PARTS.values()
    )
    assert in_editable(built, code).split() == [str(tree / part / "added.py") for part in PARTS]


def test_changed_module_of_every_part_is_seen_without_a_new_install(build, tree):
    built = build("build_editable")
    for folder in PARTS:
        with open(tree / folder / "__init__.py", "a") as source:
            source.write("\nCHANGED = __file__\n")
    code = "".join(f"import {package} as m; print(m.CHANGED)\n" for package in PARTS.values())
    assert in_editable(built, code).split() == [str(tree / part / "__init__.py") for part in PARTS]


def test_data_is_read_from_the_tree(build, tree):
    built = build("build_editable")
    (tree / "backends" / "cute" / "added.toml").write_text("seen = true\n")
    read = (
        "from importlib import resources\n"
        f"print(resources.files('{PACKAGE}.backends.cute').joinpath('added.toml').read_text())"
    )
    assert in_editable(built, read).strip() == "seen = true"


def test_backend_switched_off_is_absent_though_its_files_are_there(build, tree):
    built = build("build_editable", FSA_BUILD_TRITON="OFF")
    assert built.status == 0, built.output
    assert (tree / "backends" / "triton" / "__init__.py").is_file()
    told = json.loads(
        in_editable(
            built,
            f"import json\nfrom {PACKAGE} import info\nprint(json.dumps(info.collect()))",
        )
    )
    assert "triton" not in told["available_backends"]
    assert told["backends"]["triton"]["build_option"] == {"FSA_BUILD_TRITON": "OFF"}
