"""The commands of ``python -m base``, one module each with ``main(arguments) -> exit code``."""
