"""What holds for every test."""

import re
import signal
import sys

import pytest

# A shell that starts the tests in the background has them ignore Ctrl-C, and whatever they start
# would inherit that: tests of Ctrl-C need it as a person's terminal has it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With several pytest workers, a module stays with one, and so do all tests of the cluster."""
    from xdist.scheduler import LoadScopeScheduling

    class ByModule(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            module = nodeid.split("::")[0]
            return "tests/cluster" if module.startswith("tests/cluster/") else module

    return ByModule(config, log)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command in this process; returns exit code, standard output, standard error."""

    from dist_tl.cli import app as cli
    from dist_tl.cli import display

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["dist-tl", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        shown = capsys.readouterr()
        return left.value.code or 0, _plain(shown.out), _plain(shown.err)

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(display.console, "_width", 200)
    monkeypatch.setattr(display.errors, "_width", 200)
    handler = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, handler)


def _plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
