"""What holds for every test."""

import gc
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


# One group per session, since DeepSpeed keeps handles to the first group.
@pytest.fixture(scope="session")
def alone():
    """A process group of one rank in the test process."""
    import torch.distributed as dist
    from one_rank import join_on_cpu

    join_on_cpu(0, 1)
    yield
    gc.unfreeze()
    dist.destroy_process_group()


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


@pytest.fixture(scope="session")
def s3_environment():
    """A running embedded server as any S3 store: its AWS_* variables, the URL of its bucket."""
    from dist_tl.storage import embedded

    def describe(server):
        ours = server.environment()
        variables = {
            "AWS_ENDPOINT_URL": ours[embedded.ENDPOINT],
            "AWS_ACCESS_KEY_ID": ours[embedded.ACCESS_KEY],
            "AWS_SECRET_ACCESS_KEY": ours[embedded.SECRET],
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
        }
        return variables, f"s3://{embedded.BUCKET}"

    return describe


def _plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
