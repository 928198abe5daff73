"""What the clients of stores share."""

import errno
import socket

import pytest

from dataplane.control.transport import os_text

ERRORS = [
    (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "name or service not known"),
    (OSError(errno.ECONNREFUSED, "Connect call failed ('127.0.0.1', 1)"), "connection refused"),
    (OSError("no number"), "no number"),
]


@pytest.mark.parametrize(("error", "expected"), ERRORS)
def test_what_the_system_says_is_said_in_a_few_words(error, expected):
    assert os_text(error) == expected
