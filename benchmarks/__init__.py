"""Benchmarks of eventkern against its peers: `pytest benchmarks --benchmark-only`."""
