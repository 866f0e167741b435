"""What holds for every test."""

import signal

# A shell that starts the tests in the background has them ignore Ctrl-C, and whatever they start
# would inherit that: tests of Ctrl-C need it as a person's terminal has it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
