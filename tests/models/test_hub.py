from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from halfbyte.errors import ConfigError
from halfbyte.models import hub


@pytest.mark.parametrize("name", ["gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct", "a.b_c/d-e.f"])
def test_is_hub_id_accepts_repositories(name: str) -> None:
    assert hub.is_hub_id(name)


@pytest.mark.parametrize("name", ["./model", "/abs/model", "a/b/c", "two words", "../up", "~/model", "a/", ""])
def test_is_hub_id_refuses_paths(name: str) -> None:
    assert not hub.is_hub_id(name)


def test_is_hub_file_knows_gguf_files_of_a_repository() -> None:
    assert hub.is_hub_file("owner/name/file.Q4_1.gguf")
    assert not hub.is_hub_file("owner/name")
    assert not hub.is_hub_file("file.gguf")
    assert not hub.is_hub_file("owner/name/sub/file.gguf")


def test_download_fetches_only_what_a_model_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / hub.INDEX_FILE).write_text('{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}')
    asked: list[list[str]] = []

    def snapshot_download(name: str, *, allow_patterns: list[str], **options: object) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert hub.download("owner/name", None) == tmp_path
    assert not any("safetensors" in pattern for pattern in asked[0] if pattern != "*.json")
    assert asked[1][-2:] == ["model-1.safetensors", "model-2.safetensors"]


def test_download_uses_a_snapshot_that_lacks_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, **options: object) -> str:
        error = LocalEntryNotFoundError("incomplete")
        error.snapshot_path = str(tmp_path)
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert hub.download("owner/name", None) == tmp_path


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (LocalEntryNotFoundError("offline"), "cannot be reached"),
        (OSError("disk full"), "download failed: disk full"),
    ],
)
def test_download_says_what_went_wrong(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, **options: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ConfigError, match=said):
        hub.download("owner/name", None)
