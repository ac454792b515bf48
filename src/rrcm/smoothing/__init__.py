"""Certification of any module that maps images to logits, by randomized smoothing."""
