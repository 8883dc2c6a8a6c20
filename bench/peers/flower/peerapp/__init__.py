"""Known noise added to a model."""
