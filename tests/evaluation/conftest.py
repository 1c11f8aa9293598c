from __future__ import annotations

from pathlib import Path

import pytest
from synthetic import report_data

from safe_rlhf_v.evaluation.report import write_report
from safe_rlhf_v.evaluation.report_data import ReportData


@pytest.fixture(scope="session")
def full() -> ReportData:
    """A report with every part; do not change it (it is frozen)."""
    return report_data()


@pytest.fixture(scope="session")
def folder(full: ReportData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `full` was written into."""
    return write_report(full, tmp_path_factory.mktemp("report") / "made" / "here").parent
