"""What users see when their input is at fault: one line that names file, field and mend."""


class BridgeError(Exception):
    """A mistake in what was given to Bridge. The command line prints it and exits with code 2."""
