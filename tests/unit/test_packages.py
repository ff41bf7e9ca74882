import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["cluster", "jobs", "serving", "raysmith"])
def test_package_when_imported_comes_from_this_repository(name: str):
    found = Path(importlib.import_module(name).__file__ or "").resolve()
    assert found.is_relative_to(ROOT)


@pytest.mark.parametrize("name", ["cluster", "jobs", "serving"])
def test_every_folder_with_modules_is_a_package(name: str):
    folders = {path.parent for path in (ROOT / name).rglob("*.py")}
    assert [f for f in folders if not (f / "__init__.py").is_file()] == []
