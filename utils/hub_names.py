"""Names of models on the Hugging Face Hub, as the command line and configurations give them."""

import re

FILE_ENDINGS = (".pt", ".pth", ".safetensors", ".ckpt", ".tar", ".yaml", ".yml")
_PART = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?"
_NAME = re.compile(rf"{_PART}/{_PART}")
_NAME_AND_REVISION = re.compile(rf"({_NAME.pattern})(?:@([\w./-]+))?")


def split_hub_name(text: str) -> tuple[str, str | None] | None:
    """`org/name` or `org/name@revision` -> (org/name, revision or None); None for what can only be a path."""
    match = _NAME_AND_REVISION.fullmatch(text)
    return None if match is None or text.endswith(FILE_ENDINGS) else (match[1], match[2])


def is_repository(text: str) -> bool:
    """Whether a text has the form `org/name`."""
    return _NAME.fullmatch(text) is not None
