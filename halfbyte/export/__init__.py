"""From our form to others': merged 16-bit models, 4-bit checkpoints for bitsandbytes, GGUF files."""

from halfbyte.export.bnb4bit import ExportReport, export_bnb4bit
from halfbyte.export.gguf_adapter import GgufAdapterReport, export_gguf_adapter
from halfbyte.export.gguf_model import GgufReport, export_gguf
from halfbyte.export.in_place import merge_in_place
from halfbyte.export.merge import MergeReport, merge_adapter
from halfbyte.export.requantized import export_calibrated

__all__ = [
    "ExportReport",
    "GgufAdapterReport",
    "GgufReport",
    "MergeReport",
    "export_bnb4bit",
    "export_calibrated",
    "export_gguf",
    "export_gguf_adapter",
    "merge_adapter",
    "merge_in_place",
]
