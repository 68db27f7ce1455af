"""Pixel samplers for nerfstudio: how batches, masks and image sizes meet mining/."""
