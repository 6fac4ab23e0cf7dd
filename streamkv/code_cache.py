"""Where compiled code is kept between runs: a folder that belongs to the user and that nobody else can write to.

What others could have written is never loaded. The file names carry a digest of all that went into them, so that none is ever
taken for another.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from streamkv.errors import BackendError

__all__ = ["cache_folder", "check_owner", "write_whole"]


def cache_folder() -> Path:
    """STREAMKV_CACHE, else the user's cache folder; made if missing, mode 700.

    Raises:
        BackendError: it cannot be made, or somebody else could write there.
    """
    named = os.environ.get("STREAMKV_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(named) if named else base / "streamkv"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_owner(folder)
    except OSError as error:
        raise BackendError(
            f"the cache folder {folder} cannot be made ({error.strerror}); set STREAMKV_CACHE to a folder of yours"
        ) from error
    return folder


def check_owner(path: Path) -> None:
    """Code is loaded only where nobody else could have put or changed it.

    Raises:
        BackendError: somebody else could.
    """
    status = path.stat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o022:
        raise BackendError(f"{path} must belong to you and be writable by nobody else; repair it or set STREAMKV_CACHE")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under another name beside `path`: whoever looks meanwhile sees none, or a whole one."""
    handle, part = tempfile.mkstemp(suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        write(Path(part))
        Path(part).chmod(0o700)
        Path(part).replace(path)
    finally:
        Path(part).unlink(missing_ok=True)
