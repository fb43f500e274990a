"""`python -m rwkv_clip.demo --output FOLDER`."""

from .dataset import main

main()
