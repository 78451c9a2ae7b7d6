"""The model: frozen tower, side network, head."""

from modules.side4video import build_model, resolve_input_size

__all__ = ["build_model", "resolve_input_size"]
