"""The commands of `sprompt`, one file each: a dataclass of its settings, whose `run` does the work."""
