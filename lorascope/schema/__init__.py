"""The names that all tables share: modules with layer and role, recorded quantities with unit and meaning."""
