"""Recipe and headers -> plan."""
