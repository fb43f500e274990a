"""Models: towers and the classes that describe them, one file per family; ViT, ResNet and text transformers come from
open_clip."""
