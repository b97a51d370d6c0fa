"""A file of runs to which each is added when it is done, so that a benchmark goes on where it was."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from peft_gradproj.files import write_atomically

__all__ = ["RunsFile"]


class RunsFile:
    """Runs as JSON, beside the command, the settings and the versions that they were made with.

    Args:
        path: The file, which need not be there.
        command: That writes it.
        settings: JSON values.
        packages: Whose versions are kept.
        keys: Names of the values of a run that say which it is.
    """

    def __init__(
        self, path: Path, command: str, settings: dict[str, Any], packages: Iterable[ModuleType], keys: tuple[str, ...]
    ) -> None:
        self.path, self.keys = path, keys
        versions = {"python": platform.python_version(), **{one.__name__: one.__version__ for one in packages}}
        self.about = {"command": command, "settings": settings, "versions": versions}
        self._found = json.loads(path.read_text()) if path.exists() else {"runs": []}
        self.runs: list[dict[str, Any]] = self._found["runs"]

    def missing(self, planned: Iterable[tuple[Any, ...]]) -> Iterable[tuple[Any, ...]]:
        """Those of the planned runs that are not there, under a progress bar.

        Raises:
            SystemExit: If what is there was made with other settings, or with other versions and something is missing:
                whoever has these is shown what is there, and only what he adds could not be compared with it.
        """
        done = {tuple(run[key] for key in self.keys) for run in self.runs}
        left = [cell for cell in planned if cell not in done]
        if self.runs and (
            self._found["settings"] != self.about["settings"]
            or (left and self._found["versions"] != self.about["versions"])
        ):
            raise SystemExit(
                f"{self.path} holds runs of other settings or versions; give another --output to make all of them anew."
            )
        return tqdm(left)

    def add(self, run: dict[str, Any]) -> None:
        """Add a run and write the file."""
        self.runs.append(run)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, (json.dumps({**self.about, "runs": self.runs}, indent=1) + "\n").encode())
