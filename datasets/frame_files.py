"""Names of frame files: which files of a folder are frames by `data.image_tmpl`, and their numbers."""

import re
from string import Formatter


def frame_pattern(template: str) -> re.Pattern[str]:
    """Matches, as a whole, the file names that are `template` with any digits for the number, which is group 1."""
    parts = Formatter().parse(template)
    return re.compile("".join(re.escape(text) + ("" if field is None else r"(\d+)") for text, field, *_ in parts))
