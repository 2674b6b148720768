"""What did shuffling cost? `python -m benchmarks.studies.shuffle` tells, layer by layer."""
