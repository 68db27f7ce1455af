"""The science of soft mining, for any PyTorch training loop: torch only, no nerfstudio.

The method reads in this order:

- [importance][nerfstudio_softmining.mining.importance]: error, importance and weight of a sample (eq. 5-9);
- [langevin][nerfstudio_softmining.mining.langevin]: the Langevin chains (eq. 10) and their re-initialisation;
- [density][nerfstudio_softmining.mining.density]: exact draws from a table of weights;
- [priors][nerfstudio_softmining.mining.priors]: edges, contrast and detail of an image;
- [shrinkage][nerfstudio_softmining.mining.shrinkage]: ratios of error by tile where few samples have been seen;
- [error_map][nerfstudio_softmining.mining.error_map]: a coarse map of the error of each image;
- [thinning][nerfstudio_softmining.mining.thinning]: keeping some terms of a sum, weighted so that its mean stays;
- [records][nerfstudio_softmining.mining.records]: indexing all fields of a NamedTuple of tensors at once.

docs/own_loop.md builds a training loop from these, piece by piece.

Equation, table and section numbers are those of Kheradmand et al., "Accelerating Neural Field Training via Soft
Mining", CVPR 2024.
"""
