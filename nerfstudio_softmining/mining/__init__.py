"""The science of soft mining, for any PyTorch training loop: torch only, no nerfstudio.

The method reads in this order:

- [importance][nerfstudio_softmining.mining.importance]: error, importance and weight of a sample (eq. 7-9);
- [langevin][nerfstudio_softmining.mining.langevin]: the pool of Langevin chains (eq. 10) and its re-initialisation;
- [edges][nerfstudio_softmining.mining.edges]: where re-initialised chains start (Sobel, section 4.1), and the contrast
  and detail of an image;
- [density][nerfstudio_softmining.mining.density]: exact draws from a table of weights that can change entry by entry;
- [tiles][nerfstudio_softmining.mining.tiles]: draws from a table that is fixed within tiles, and changes tile by tile;
- [error_map][nerfstudio_softmining.mining.error_map]: a coarse map of the error of each image.

docs/mining.md has a loop of your own, piece by piece.

Equation, table and section numbers are those of Kheradmand et al., "Accelerating Neural Field Training via Soft
Mining", CVPR 2024.
"""
