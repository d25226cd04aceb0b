"""The conformance kit: every component of a backend held to the reference. ``python -m base verify`` runs it."""
