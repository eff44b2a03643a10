"""Methods that work on the singular values and vectors of task vectors."""
