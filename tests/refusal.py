"""The error that a file or a setting is refused with."""

import re

import pytest

from jcnf._checks import InputError


def fails(*words):
    """Expect an error of one line that has these words, in this order."""
    pattern = "[^\n]*".join(re.escape(str(word)) for word in ("", *words, ""))
    return pytest.raises(InputError, match=rf"\A{pattern}\Z")
