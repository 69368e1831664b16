"""From tables and arrays to tables: pure functions, no torch, no state."""
