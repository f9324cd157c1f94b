"""What all tests share."""

import signal
import threading


def pytest_configure(config):
    """A shell's background job ignores SIGINT, and all that it starts: tests that send one must not depend on it."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
