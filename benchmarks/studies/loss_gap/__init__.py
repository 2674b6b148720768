"""Why did the loss read 85 on the GPU and 4 on the CPU? `python -m benchmarks.studies.loss_gap` tells how."""
