"""Write a folder as a whole or not at all."""
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a new folder to write to, which takes the place of ``folder`` at the end; after an error nothing is left.

    Raises:
        OSError: It cannot be written; the message names ``folder`` and why (a full disk, no permission).
    """
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise OSError(f"{folder} cannot be written: {error.strerror}") from None
    try:
        yield work
        work.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        work.rename(folder)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError) and error.strerror:
            raise OSError(f"{folder} cannot be written: {error.strerror}") from None
        raise
