"""halfbyte: fine-tune large language models with QLoRA."""

__version__ = "0.1.0"
