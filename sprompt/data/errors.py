"""The error of a user's files."""


class DataError(ValueError):
    """A file that must be corrected before it can be used. The message names the file, and the id or line in it."""


class SizeError(DataError):
    """A picture has another size than its record."""
