"""A trained checkpoint that answers."""

from inference.recognizer import Recognizer

__all__ = ["Recognizer"]
