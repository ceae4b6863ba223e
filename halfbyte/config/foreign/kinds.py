"""Which trainer a file is for."""

from __future__ import annotations

from pathlib import Path

from halfbyte.config.foreign.axolotl import AXOLOTL
from halfbyte.config.foreign.llama_factory import LLAMA_FACTORY
from halfbyte.config.foreign.translation import Document, Trainer, Translation, read_document, translate
from halfbyte.errors import ConfigError

KINDS = {"axolotl": AXOLOTL, "llama-factory": LLAMA_FACTORY}
_TELLING = {"axolotl": ("base_model",), "llama-factory": ("model_name_or_path", "stage", "finetuning_type")}


def translate_file(path: Path, kind: str | None = None) -> Translation:
    """Translate another trainer's YAML file.

    Args:
        path: The file.
        kind: One of KINDS; None to tell by the keys.

    Raises:
        ConfigError: It is no YAML, no known trainer's, or lacks what no run goes without.
    """
    document = read_document(path)
    return translate(document, KINDS[kind] if kind else _recognise(document))


def _recognise(document: Document) -> Trainer:
    for kind, keys in _TELLING.items():
        if keys[0] in document.values and (len(keys) == 1 or any(key in document.values for key in keys[1:])):
            return KINDS[kind]
    raise ConfigError(f"{document.path}: no keys of {' or '.join(one.name for one in KINDS.values())}; see --from")
