"""What every error of this project derives from that a user can mend."""


class UserError(Exception):
    """What was given cannot be used; the message names it and says what to do.

    Each kind also derives from the builtin that it is, ValueError mostly, so that nobody needs to know this class.
    Commands say it in one sentence and end with exit code 2; any other error is a fault of the project.
    """
