"""Scripts that fetch and convert public data and models."""
