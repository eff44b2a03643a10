"""What a person should see before and after a merge: one pass over the models, and findings as plain data."""
