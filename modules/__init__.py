"""The model: frozen tower, side network, head."""

from modules.build import build_model

__all__ = ["build_model"]
