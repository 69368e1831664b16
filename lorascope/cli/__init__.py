"""Commands of ``lorascope``, one module per command with ``main(argv) -> exit code``."""
