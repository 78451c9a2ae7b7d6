"""Names of frame files, as `data.image_tmpl` defines them."""

import contextlib
import re
from string import Formatter

BASES = {"b": 2, "o": 8, "x": 16, "X": 16}  # type letter of a format -> base of its numbers


class FramePattern:
    """The names that `template.format(n)` gives, to the letter, for the numbers n from 0."""

    def __init__(self, template: str):
        parts = list(Formatter().parse(template))
        self._template = template
        spec = next((spec or "" for _, field, spec, _ in parts if field is not None), "")
        self._base = BASES.get(spec[-1:], 10)
        self._fill = spec[0] if spec[1:2] in ("<", ">", "^", "=") and not spec[0].isalnum() else ""
        self._pattern = re.compile("".join(re.escape(text) + ("" if f is None else "(.+?)") for text, f, *_ in parts))

    def fullmatch(self, name: str) -> re.Match[str] | None:
        """The match of `name`, or None if it is no frame."""
        return self._match(name)[0]

    def number(self, name: str) -> int | None:
        """The number of the frame, or None if `name` is no frame."""
        return self._match(name)[1]

    def _match(self, name: str) -> tuple[re.Match[str], int] | tuple[None, None]:
        if match := self._pattern.fullmatch(name):
            with contextlib.suppress(ValueError, OverflowError):
                digits = match[1].strip(self._fill).replace(",", "")
                number = int(digits, self._base)  # int() accepts spaces, underscores, and 0x
                if number >= 0 and self._template.format(number) == name:
                    return match, number
        return None, None


def frame_pattern(template: str) -> FramePattern:
    """Return the pattern of the names of a template that `data.image_tmpl` accepts."""
    return FramePattern(template)
