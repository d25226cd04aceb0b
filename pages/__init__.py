"""What the pages that a tool writes have in common; it knows nothing of what they show."""
