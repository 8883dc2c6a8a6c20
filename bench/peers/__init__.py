"""The same work given to Mailboat, Flower and NVIDIA FLARE, each with real processes and its default settings."""
