"""Training of the mini model: ``python -m semanticodec.training --help``."""
