"""Where the files that ship with the package are: next to it in a checkout, inside it in a wheel."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent

#: True if electra_wrap runs from a source checkout (or an editable install of one).
IN_CHECKOUT = (PACKAGE.parent / "vendor" / "electra.lock").is_file()

_SHIPPED = PACKAGE.parent if IN_CHECKOUT else PACKAGE / "_shipped"

CONFIGS = _SHIPPED / "configs"
PATCHES = _SHIPPED / "patches"
LOCK_FILE = _SHIPPED / "vendor" / "electra.lock"


def vendor_directory() -> Path:
    """Directory of verified upstream checkouts: `vendor/` of a source checkout, else the user's cache."""
    if IN_CHECKOUT:
        return LOCK_FILE.parent
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "electra_wrap"
