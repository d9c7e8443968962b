"""Options of the conformance suite, and the count per backend that its sessions end in."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

SIZES = ("small", "medium", "large")
OUTCOMES = ("passed", "declared unsupported", "unavailable", "too large here", "failed")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    group.addoption(
        "--backend",
        action="append",
        default=[],
        metavar="NAME",
        help="run the conformance cases of this backend, and fail if none runs; repeatable; "
        "default: every backend that is available",
    )
    group.addoption(
        "--size",
        choices=SIZES,
        help="largest conformance cases to run; default: large on a GPU, small on a CPU",
    )
    group.addoption(
        "--device",
        choices=("cpu", "cuda"),
        help="where the conformance cases run; default: cuda if there is one",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(ConformanceCount(config), "conformance-count")


class ConformanceCount:
    """Counts outcomes per backend from the reports, which come from workers too.

    Args:
        config: of the session.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._asked = tuple(dict.fromkeys(config.getoption("--backend")))
        self._counts: dict[str, Counter[str]] = defaultdict(Counter)
        self._reasons: dict[str, str] = {}
        self._collected_only = config.getoption("--collect-only")
        self._worker = hasattr(config, "workerinput")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        said = dict(report.user_properties)
        backend = said.get("backend")
        if backend is None or (report.when != "call" and report.passed):
            return  # set-up and tear-down count where they end the test
        outcome = "failed" if report.failed else said.get("outcome", "passed")
        self._counts[backend][outcome] += 1
        if outcome == "unavailable":
            self._reasons[backend] = report.longrepr[2].removeprefix("Skipped: ")

    def _idle(self) -> list[str]:
        """Backends that were asked for and ran nothing."""
        if self._collected_only or self._worker:
            return []
        ran = ("passed", "failed")
        return [x for x in self._asked if not any(self._counts[x][outcome] for outcome in ran)]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._idle():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        backends = dict.fromkeys((*self._asked, *self._counts))
        if not backends:
            return
        idle = self._idle()
        terminalreporter.section("conformance")
        for backend in backends:
            count = self._counts[backend]
            line = ", ".join(f"{count[outcome]} {outcome}" for outcome in OUTCOMES)
            terminalreporter.line(f"{backend}: {line}")
            if backend in self._reasons:
                terminalreporter.line(f"    {self._reasons[backend]}")
            if backend in idle:
                terminalreporter.line("    was asked for and ran nothing", red=True)
