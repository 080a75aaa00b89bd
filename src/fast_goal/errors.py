"""The errors a user may meet. Each message names the file, the row or key, the value seen and the fix."""


class FastGoalError(Exception):
    """Something the user can mend; the command line prints the message without a traceback."""


class TemporaryError(FastGoalError):
    """A network or a server that is away: the same command may work in a while. Its exit status is os.EX_TEMPFAIL, 75."""


class ConfigError(FastGoalError):
    """params.yaml, or an override, holds an unknown key or a value out of range."""


class DataError(FastGoalError):
    """A data set, a table or an image cannot be used."""


class ModelError(FastGoalError):
    """A checkpoint or a detector cannot be loaded or does not fit."""


class ValidationError(FastGoalError):
    """A critical expectation on the data failed."""
