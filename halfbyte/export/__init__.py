"""From our form to others': merged 16-bit models, 4-bit checkpoints for bitsandbytes."""

from halfbyte.export.bnb4bit import ExportReport, export_bnb4bit
from halfbyte.export.in_place import merge_in_place
from halfbyte.export.merge import MergeReport, merge_adapter
from halfbyte.export.requantized import export_calibrated

__all__ = ["ExportReport", "MergeReport", "export_bnb4bit", "export_calibrated", "merge_adapter", "merge_in_place"]
