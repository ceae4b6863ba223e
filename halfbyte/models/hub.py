"""Downloads from the hub: only what a model needs, and one clear message where that fails.

huggingface_hub does the work: its cache, its tokens, and HF_HUB_OFFLINE, which keeps it from the network.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from halfbyte.errors import ConfigError
from halfbyte.models.described import INDEX_FILE, shard_names

T = TypeVar("T")

DESCRIPTION_FILES = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
# Repositories keep other frameworks' and tools' files in folders of their own.
IGNORED_FILES = ["*/*"]


def is_hub_id(name: str) -> bool:
    """Say whether `name` looks like a repository: `owner/name`, or `name` for the oldest ones."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name) is not None


def is_hub_file(name: str) -> bool:
    """Say whether `name` looks like a GGUF file in a repository: `owner/name/file.gguf`."""
    repository, _, file = name.rpartition("/")
    return file.endswith(".gguf") and "/" in repository and is_hub_id(repository)


def download(name: str, revision: str | None) -> Path:
    """Return the folder of a model repository with its configuration, tokenizer and safetensors weights in it."""
    import huggingface_hub

    def fetch(patterns: list[str]) -> Path:
        try:
            return Path(
                huggingface_hub.snapshot_download(
                    name, revision=revision, allow_patterns=patterns, ignore_patterns=IGNORED_FILES
                )
            )
        except huggingface_hub.errors.LocalEntryNotFoundError as error:
            # Offline, a snapshot that lacks files we may not need is still the snapshot.
            partial = getattr(error, "snapshot_path", None)
            if partial is None:
                raise
            return Path(partial)

    folder = _reach(name, revision, lambda: fetch(DESCRIPTION_FILES))
    index = folder / INDEX_FILE
    weights = ["model.safetensors"]
    if index.exists():
        weights = shard_names(index)
    return _reach(name, revision, lambda: fetch(DESCRIPTION_FILES + weights))


def download_file(name: str, revision: str | None) -> Path:
    """Return one file of a repository, given as `owner/name/file`."""
    import huggingface_hub

    repository, _, file = name.rpartition("/")
    return Path(_reach(name, revision, lambda: huggingface_hub.hf_hub_download(repository, file, revision=revision)))


def _reach(name: str, revision: str | None, fetch: Callable[[], T]) -> T:
    from huggingface_hub import errors

    at = f" at revision {revision!r}" if revision else ""
    try:
        return fetch()
    except errors.GatedRepoError as error:
        raise ConfigError(
            f"model {name!r}: the hub gives it only to accounts that accepted its terms; accept them there, then run "
            "`hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(f"model {name!r}: no such folder here and no such repository on the hub") from error
    except (errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError) as error:
        raise ConfigError(f"model {name!r}{at}: the hub has the repository, but not that revision or file") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ConfigError(
            f"model {name!r}{at}: no such folder here, not in the hub's cache, and the hub cannot be reached (no "
            "network, or HF_HUB_OFFLINE is set). Download it where there is a network, or name a folder or GGUF file"
        ) from error
    except (errors.HTTPError, OSError) as error:
        raise ConfigError(f"model {name!r}{at}: the download failed: {error}") from error
