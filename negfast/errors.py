"""What goes wrong because of what the user gave."""


class InputError(Exception):
    """Bad usage or input; the message is one line: file, row or key, found, expected. The command line exits 2."""


class TrainingError(Exception):
    """Training failed; the message is one line. The command line exits 1."""
