"""Errors whose message is all a user needs; the command line prints it and exits with ``exit_code``."""


class FedsimError(Exception):
    exit_code = 1


class ConfigError(FedsimError):
    """A configuration, option or combination that makes no sense."""

    exit_code = 2


class DataError(FedsimError):
    """A file or folder that is missing, damaged or not what was expected."""

    exit_code = 2


class StorageError(FedsimError):
    """A disk that is full, read-only or failing: what could not be written, the reason, and what helps.

    Args:
        path: file or folder.
        reason: of the operating system or of the database.
        mend: what helps; the default is for files of a run.
    """

    def __init__(self, path: object, reason: object, mend: str = "make room there; 'fedsim resume' continues a run"):
        super().__init__(f"{path}: cannot be written: {reason}; {mend}")
        self.path, self.reason = path, reason
