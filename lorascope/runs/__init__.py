"""Readers and writers of run folders and adapter folders, without torch."""
