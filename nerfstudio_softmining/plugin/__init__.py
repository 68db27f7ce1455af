"""What nerfstudio sees: pixel sampler, datamanager, models, methods and dataparsers."""
