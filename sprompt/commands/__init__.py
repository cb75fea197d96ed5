"""The commands of `sprompt`, one file each. A command is a dataclass of its settings; its method `run` does the work."""
