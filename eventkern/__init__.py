"""Fused kernels, sampler, loader, model and trainer for sequences of multi-category events."""
