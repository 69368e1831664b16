"""A figure as data, and the two backends that draw it."""
