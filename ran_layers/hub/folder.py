"""Write a folder as a whole or not at all."""
import secrets
import shutil
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
    there = folder.is_dir()
    # In a folder that is there already: it may be a file system of its own, and files are not renamed across two.
    work = (folder if there else folder.parent) / f".{folder.name}-{secrets.token_hex(4)}"
    try:
        work.mkdir()
    except OSError as error:
        raise OSError(f"{given} cannot be written: {error.strerror}") from None
    try:
        yield work
        if there:
            for old in set(folder.iterdir()) - {work}:
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
