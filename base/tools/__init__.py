"""The commands of ``python -m base``, a module each with ``main(arguments) -> exit code``, and what several of them use."""
