"""Files that other programs wrote: read within limits, and shown without control characters."""
