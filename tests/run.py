"""`make test`: every check that needs no GPU, one after the other, timed, with one closing line for all."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

LINTS = {
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "mypy": ["mypy"],
}
#: title -> (marks, further options); small tests share the cores, one process each, big ones use all cores in turn
SUITES = {
    # First, so that a suite that may be empty is not what pytest says last.
    "browser tests": ("browser and not gpu", []),
    "unit tests": ("not real and not browser and not gpu", ["-n", "auto", "--maxprocesses=4", "--dist=worksteal"]),
    "real models and data": ("real and not browser and not gpu", []),
}


def run(title: str, command: list[str]) -> tuple[int, float]:
    """Run one step of `python -m` with its output shown; return exit code and seconds."""
    print(f"\n== {title}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    code = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=False).returncode
    return code, time.monotonic() - start


def counts(report: Path, code: int) -> dict[str, int]:
    """Read passed, failed and skipped from a pytest XML report.

    A run that ends badly without a failed test (or without a report) counts as one failure.
    """
    total = {"passed": 0, "failed": 0, "skipped": 0}
    suites = ElementTree.parse(report).iter("testsuite") if report.exists() else ()
    for suite in suites:
        number = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
        total["failed"] += number["failures"] + number["errors"]
        total["skipped"] += number["skipped"]
        total["passed"] += number["tests"] - number["failures"] - number["errors"] - number["skipped"]
    if code and not total["failed"]:
        total["failed"] = 1
    return total


def main() -> int:
    """Run lints and suites; return 0 if nothing failed."""
    start = time.monotonic()
    lines: list[str] = []
    total = {"passed": 0, "failed": 0, "skipped": 0}
    remarks: list[str] = []
    for title, command in LINTS.items():
        code, seconds = run(title, command)
        total["failed"] += code != 0
        lines.append(f"{title:<22}{'failed' if code else 'ok':<42}{seconds:8.1f} s")
    for title, (marks, options) in SUITES.items():
        if title == "browser tests" and not (any(map(shutil.which, CHROMIUM)) and shutil.which("chromedriver")):
            remarks.append("browser tests did not run: no Chromium with its driver here")
            continue
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = ["pytest", *options, "-m", marks, "--durations=5", f"--junitxml={report}", *sys.argv[1:]]
            code, seconds = run(title, command)
            # Exit code 5: nothing was collected, which only the unit suite may not afford.
            empty = code == 5 and title != "unit tests"
            result = counts(report, 0 if empty else code)
        if empty:
            remarks.append(f"{title} did not run: there are none")
        total = {key: total[key] + result[key] for key in total}
        summary = ", ".join(f"{number} {key}" for key, number in result.items())
        lines.append(f"{title:<22}{summary:<42}{seconds:8.1f} s")
    print("\n" + "\n".join(lines))
    summary = ", ".join(f"{number} {key}" for key, number in total.items())
    print("; ".join([f"{summary} in {time.monotonic() - start:.1f}s", *remarks]), flush=True)
    return 1 if total["failed"] else 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
