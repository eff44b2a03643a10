"""Methods that weigh columns of a matrix by how far they moved and turned."""
