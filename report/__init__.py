"""``python -m base report``: what a run's folder tells, as one page. It reads folders, and nothing of a run depends on it."""
