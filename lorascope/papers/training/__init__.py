"""Training of the arms: missing runs, own seeds, short runs and the report of `reproduce`."""
