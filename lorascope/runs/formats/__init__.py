"""Adapter folders of other libraries, read as files: one module a format."""
