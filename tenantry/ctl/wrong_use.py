"""What the command line refuses before it asks anybody."""


class WrongUse(Exception):
    """The command makes no sense; the message says what would."""
