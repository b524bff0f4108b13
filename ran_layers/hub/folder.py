"""Write a folder as a whole or not at all."""
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a new folder to write to, whose content is that of ``folder`` at the end; after an error nothing is left.

    A ``folder`` that is there already, perhaps the current one or a link, stays and loses what was in it.

    Raises:
        OSError: It cannot be written; the message names ``folder`` and why (a full disk, no permission).
    """
    given, folder = folder, folder.resolve()
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise OSError(f"{given} cannot be written: {error.strerror}") from None
    try:
        yield work
        work.chmod(0o755)
        if folder.is_dir():
            for old in folder.iterdir():
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
            for new in work.iterdir():
                new.rename(folder / new.name)
            work.rmdir()
        else:
            work.rename(folder)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError) and error.strerror:
            raise OSError(f"{given} cannot be written: {error.strerror}") from None
        raise
