"""load_dataset under its own name: the datasets package where it is installed."""

from __future__ import annotations

from typing import Any

from halfbyte.errors import ConfigError


def load_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
    """Call datasets.load_dataset; a file or folder of examples that it would not take is given to its json reader.

    Raises:
        ConfigError: The datasets package is not installed.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ConfigError("load_dataset needs the datasets package: pip install 'halfbyte[hub]'") from error
    readers = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
    suffix = next((end for end in readers if path.endswith(end)), None)
    if suffix is not None and not args and "data_files" not in kwargs:
        return datasets.load_dataset(readers[suffix], data_files=path, **kwargs)
    return datasets.load_dataset(path, *args, **kwargs)
