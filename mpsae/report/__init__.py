"""A page about SAEs, made from the files of measures in their folders."""

from mpsae.report.page import write_report
from mpsae.report.records import Record, read_record

__all__ = ["Record", "read_record", "write_report"]
