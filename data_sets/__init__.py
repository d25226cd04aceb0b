"""Data sets as they lie on the disk: annotation formats and their faults, the download, the data that the project draws itself."""
