"""Moving a finished output from its staging directory to its destination.

One rename publishes an output, so OUT is the old one or the new one, and never a part of either. Where a file system cannot
exchange directories, replacing one takes two renames, and OUT is missing in between.
"""

from __future__ import annotations

from ..checkpoints.base import MANIFEST
from ..core.errors import InputError
from .destination import (
    Destination,
    check_existing,
    refuse_changed_files,
    refuse_overlap,
    refuse_unknown_files,
)
from .directory import Entry, exchange, move_directory, rename_to_new
from .staging import Staging


def publish(destination: Destination, staging: Staging) -> None:
    """Move a finished output to its destination."""
    if not destination.directory:
        staging.keep_manifest()
    staging.mark()
    refuse_overlap(destination)
    check_existing(destination)
    if destination.directory:
        _move(destination, staging, staging.staged)
    else:
        _move_with_manifest(destination, staging)
    staging.parent.sync()


def _move_with_manifest(destination: Destination, staging: Staging) -> None:
    """Move a single file, after its manifest.

    After a crash in between, `negmerge verify` reports that the two differ, and the next merge puts the older manifest back. In
    the other order a crash would leave an output with no manifest, or with that of another.
    """
    [name] = destination.files
    with staging.staged.directory() as staged:
        try:
            (staged / MANIFEST).rename(staging.published_manifest)
            staging.parent.sync()
            _move(destination, staging, staged / name)
        except BaseException:
            staging.put_back()
            raise


def _move(destination: Destination, staging: Staging, staged: Entry) -> None:
    """Move a directory or a file to the destination by one rename."""
    if not (destination.overwrite and staging.published.exists()):
        rename_to_new(staged, staging.published)
    elif destination.directory:
        _exchange(destination, staging)
    else:
        staged.rename(staging.published)


def _exchange(destination: Destination, staging: Staging) -> None:
    """Exchange an older output with the new one; the staging directory then holds the older."""
    if exchange(staging.staged, staging.published):
        _check_exchanged(destination, staging)
        return
    try:
        if not move_directory(staging.published, staging.former, MANIFEST):
            staging.notes.append(
                f"{destination.path}: was replaced file by file: its directory cannot be moved"
            )
        _refuse_late_changes(destination, staging.former)
        staging.staged.rename(staging.published)
    except BaseException:
        staging.put_back()
        raise


def _check_exchanged(destination: Destination, staging: Staging) -> None:
    """Check the older output once more after the exchange, for what came since the last check."""
    try:
        _refuse_late_changes(destination, staging.staged)
    except (InputError, OSError):
        exchange(staging.staged, staging.published)
        raise


def _refuse_late_changes(destination: Destination, older: Entry) -> None:
    with older.directory() as found:
        refuse_unknown_files(destination, found)
    refuse_changed_files(destination, older.path)
