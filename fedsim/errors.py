"""Errors whose message is all a user needs; the command line prints it and exits with ``exit_code``."""


class FedsimError(Exception):
    exit_code = 1


class ConfigError(FedsimError):
    """A configuration, option or combination that makes no sense."""

    exit_code = 2


class DataError(FedsimError):
    """A file or folder that is missing, damaged or not what was expected."""

    exit_code = 2
