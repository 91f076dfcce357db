"""A download that cannot fail silently: repositories of the hub, fetched in pieces, continued after every kind of
interruption, and verified.

`huggingface_hub` does the talking: addresses, tokens, sessions, errors. Its own downloads begin again from zero in a
new process (its issue 4196; so in 2.4.0), so what is on the disk is kept and counted here. Everything comes over plain
HTTP, never over Xet, which a mirror does not pass on and which cannot go on where it stopped either.
"""

from .errors import DownloadError
from .fetching import download
from .verification import CheckedFile, Verified, verify

__all__ = ["CheckedFile", "DownloadError", "Verified", "download", "verify"]
