"""What the benchmark's parts cost on this machine: ``python -m base bench``."""
