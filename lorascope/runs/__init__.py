"""Run folders and adapter folders, read and written without torch."""
