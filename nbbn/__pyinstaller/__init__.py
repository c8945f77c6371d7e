"""What PyInstaller has to know of nbbn; it finds this folder by the entry point in pyproject.toml."""

from pathlib import Path


def get_hook_dirs() -> list[str]:
    return [str(Path(__file__).parent)]
