"""Provably robust image classifiers by contrastive denoising and randomized smoothing."""
