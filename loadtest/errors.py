"""What keeps a load test from giving an answer.

LoadtestError
├── PicturesMissing        a folder without pictures
├── ServerNotReady         nothing answers, or it says that it is not ready, or it wants an API key
├── ServerNotStarted       the server to be tested ended, or took too long, before it was ready
└── ServerGone             it answered, and then refused every connection
"""


class LoadtestError(Exception):
    """Base of them; the message is a line for the user."""


class PicturesMissing(LoadtestError):
    """Nothing to send."""


class ServerNotReady(LoadtestError):
    """The server at the URL cannot be tested."""


class ServerNotStarted(LoadtestError):
    """The server started for the test did not become ready."""


class ServerGone(LoadtestError):
    """The server went away during the test."""
