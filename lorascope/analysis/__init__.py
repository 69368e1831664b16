"""Analysis of runs and adapters: pure functions from tables and arrays to tables, without torch."""
