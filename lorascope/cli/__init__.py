"""The commands of ``lorascope``: one module each, with ``main(argv) -> exit code``."""
