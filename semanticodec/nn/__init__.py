"""Network modules: each takes a value from :mod:`semanticodec.config` and knows nothing of diffusion."""
