"""Towers: RWKV here; ViT, ResNet and text transformers come from open_clip."""

from .rwkv import ImageTower, TextTower

__all__ = ["ImageTower", "TextTower"]
