"""The report page of a run. It is built from the run's files, so it can be written again at any time."""

from hymba_tune.report.compare import best_run, write_comparison
from hymba_tune.report.curves import loss_picture
from hymba_tune.report.evaluations import tabulate
from hymba_tune.report.page import write_report
from hymba_tune.report.record import RunRecord
from hymba_tune.report.verdict import Verdict, judge

__all__ = ["RunRecord", "Verdict", "best_run", "judge", "loss_picture", "tabulate", "write_comparison", "write_report"]
