"""Soft mining for nerfstudio (Kheradmand et al., CVPR 2024)."""

__version__ = "0.1.0"
