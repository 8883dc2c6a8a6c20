"""The demonstration: a whole federation on one machine, from real processes and a real broker."""
