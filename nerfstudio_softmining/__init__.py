"""Soft mining for nerfstudio (Kheradmand et al., CVPR 2024)."""
