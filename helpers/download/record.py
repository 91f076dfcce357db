"""The small file in a downloaded folder that says what it is: repository, commit, sizes and checksums.

`download.json` holds the fields of `Snapshot`. With it a folder can be verified again where no network is.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from .remote import RemoteFile, Snapshot

RECORD = "download.json"


def write_record(folder: Path, snapshot: Snapshot) -> None:
    """Write `download.json`; an interrupt leaves the old one."""
    half = folder / f"{RECORD}.new"
    half.write_text(json.dumps(asdict(snapshot), indent=2) + "\n", encoding="utf-8")
    os.replace(half, folder / RECORD)


def read_record(folder: Path) -> Snapshot | None:
    """What `download.json` says; None where there is none that can be read."""
    try:
        known = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        files = tuple(RemoteFile(**file) for file in known.pop("files"))
        return Snapshot(**known, files=files)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
