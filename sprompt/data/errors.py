"""The error of a user's files."""


class DataError(ValueError):
    """A file that cannot be used as it is. The message names the file, and the id or line in it."""
