"""What a tensor's name means: layer, role, tower. Known from names and configs, not from a list of models."""
