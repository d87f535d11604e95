"""gcsfs as Orbax uses it here: what is written is sent in one request when the file is closed.

gcsfs itself opens an upload session for each file, however small. Where the last answer of a session is lost, asking again finds no
session, and a save that was complete has failed. A whole file can be sent again.
"""

from __future__ import annotations

import io
from typing import Any

from gcsfs.core import GCSFileSystem


class WholeFiles(GCSFileSystem):
    """Google Cloud Storage with files that fit in memory: records and marks beside the arrays, which TensorStore writes."""

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _WholeFile(self, path) if mode == "wb" else super()._open(path, mode=mode, **options)


class _WholeFile(io.BytesIO):
    def __init__(self, files: GCSFileSystem, path: str) -> None:
        super().__init__()
        self._files, self._path = files, path

    def close(self) -> None:
        """Sends what was written, once."""
        if not self.closed:
            data = self.getvalue()
            super().close()
            self._files.pipe_file(self._path, data)
