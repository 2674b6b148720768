"""Where did the throughput go? `python -m benchmarks.studies.throughput` times every way to run a step."""
