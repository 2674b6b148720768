"""Where did the utilisation go? `python -m benchmarks.studies.utilization` tells what a device waits for."""
