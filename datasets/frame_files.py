"""Names of frame files, as `data.image_tmpl` defines them."""

import re
from string import Formatter


def frame_pattern(template: str) -> re.Pattern[str]:
    """Return a pattern for `fullmatch` on file names: `template` with any digits as the number, which is group 1."""
    parts = Formatter().parse(template)
    return re.compile("".join(re.escape(text) + ("" if field is None else r"(\d+)") for text, field, *_ in parts))
