"""The few loops over bits and bytes that must run at memory speed."""
