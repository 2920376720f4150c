"""The one exception that is a user's to mend, not ours."""


class UserError(Exception):
    """Something in the config, a model, a data file or an artifact is wrong.

    The message is shown as it is, without a traceback: it names the file or key, the value found, what was
    expected and what to do.
    """
