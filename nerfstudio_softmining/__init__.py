"""Soft mining for nerfstudio (Kheradmand et al., CVPR 2024)."""

import os

# Large tensors on the CPU in huge pages, where the system has them: a step of fitting a photograph of 14 megapixels
# allocates 50 MB, and takes 17 ms instead of 29. Torch reads this at its first allocation, so that it
# can not wait until `compat` is imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
