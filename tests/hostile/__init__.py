"""Hostile input, one file each: the folder names the decoder that gets it, the name begins with the rule it breaks."""
