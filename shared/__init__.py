"""What at least two of broker, coordinator, edge_client and mailboat import."""
