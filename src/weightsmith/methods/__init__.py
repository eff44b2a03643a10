"""Merge methods: mathematics on arrays. They know nothing of files, models' names, threads or devices."""
