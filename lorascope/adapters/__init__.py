"""Updates on a live model: attached, read off, switched off."""
