"""The error that a user can mend."""

from __future__ import annotations

import re


class InputError(Exception):
    """Bad input of the user: one line with the file, what was expected, what was found, and the way out."""

    def __init__(self, message: str) -> None:
        super().__init__(re.sub(r"\s*\n\s*", " ", message))  # libraries quoted in it may use several lines
