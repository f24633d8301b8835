from __future__ import annotations

import os
from pathlib import Path

import pytest
from command import run  # noqa: F401

# Before the libraries are imported. Models are made from configurations; nothing may be asked of a hub.
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Only with -m libraries: make test has not installed what these tests import."""
    return None if config.option.markexpr == "libraries" else True
