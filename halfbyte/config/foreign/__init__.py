"""Configurations of other trainers, translated into run.yaml: every key, or said why not."""

from halfbyte.config.foreign.kinds import KINDS, translate_file
from halfbyte.config.foreign.translation import Translation

__all__ = ["KINDS", "Translation", "translate_file"]
