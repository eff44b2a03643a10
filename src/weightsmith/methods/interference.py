"""Methods that decide entry by entry which task vectors take part."""
