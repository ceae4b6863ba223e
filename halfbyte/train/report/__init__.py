"""report.html: a run to look at, in one file that needs nothing else."""

from halfbyte.train.report.page import save_report
from halfbyte.train.report.record import RunRecord, make_record

__all__ = ["RunRecord", "make_record", "save_report"]
