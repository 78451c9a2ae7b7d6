"""The model: frozen tower, side network, head."""

from modules.side4video import build_model

__all__ = ["build_model"]
