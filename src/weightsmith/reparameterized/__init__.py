"""Models that are trained in another form than they are used in: folding, and unfolding where that is exact."""
