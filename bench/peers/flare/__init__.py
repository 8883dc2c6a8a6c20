"""The job that NVIDIA FLARE runs, in an environment of its own."""
