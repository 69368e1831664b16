"""Evidence: the rules that judge claims, their registration, and the files from which anyone can judge them again."""
