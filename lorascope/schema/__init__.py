"""Shared schema of all tables: modules with layer and role, recorded quantities with unit and definition."""
