"""Run the GPU tests; arguments go to pytest. Without QUICK, a skipped test counts as failed.

python scripts/gpu/run_tests.py -k resume
"""

import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Skipped:
    """Pytest plugin that counts skipped tests."""

    count = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a skipped test."""
        self.count += report.skipped


def main() -> int:
    """Run the tests and return the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # at its limit, report what failed
    skipped = Skipped()
    words = ["-m", "gpu", "-q", str(ROOT / "tests" / "test_gpu.py"), *sys.argv[1:]]
    code = pytest.main(words, plugins=[skipped])
    if skipped.count and not os.environ.get("QUICK"):
        print(f"tests skipped: {skipped.count}; on a GPU all of them must run")
        return 1
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
