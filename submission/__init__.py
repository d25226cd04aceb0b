"""A folder of MLPerf results, made from finished runs and held to MLPerf's own checkers: ``python -m base submission``."""
