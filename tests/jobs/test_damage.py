"""Every file of a finished and of an interrupted run, damaged in every way, before every verb.

Each call ends with the results of the undisturbed run, or with a named error and its remedy.
"""

import io
import json
import shutil
import sys
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml
from inline_workers import open_inline_workers

from dist_tl import errors
from dist_tl.cli import app as cli
from dist_tl.cli import display
from dist_tl.jobs import run as jobs_run
from dist_tl.report import collect
from dist_tl.train.checkpoints import Checkpoints

TRAINING = {"steps": 4, "batch_size": 8, "optimizer": {"learning_rate": 3e-3}}
JOB = {
    "kind": "transfer",
    "seeds": 1,
    "lanes": 1,
    "source": {
        "data": {"source": "digits", "classes": ["0", "1", "2"], "limit": 60},
        "holdout_folds": 4,
        "classifier": {"kind": "resnet", "width": 4, "blocks": [1]},
        "classifier_training": TRAINING,
        "generator": {"channels": [8], "num_steps": 2},
        "generator_training": TRAINING,
    },
    "target": {
        "data": {"source": "digits", "classes": ["5", "6"], "limit": 40},
        "labels_per_class": 3,
        "network": {"kind": "resnet", "width": 4, "blocks": [1], "norm": "group"},
        "training": TRAINING,
    },
    "arms": ["scratch", "p_ssl"],
    "p_ssl": {"samples": 32, "loss": {"lambda_guard": "off"}},
    "shards": {"samples_per_shard": 16, "lanes": 1},
    "checkpoints": {"every_steps": 1},
    "trainers": {"workers": 1},
}


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES = {
    "a flipped bit": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "{}": lambda path: path.write_bytes(b"{}"),
    "deleted": Path.unlink,
}


@pytest.fixture(scope="module")
def patched(alone):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs_run, "open_workers", open_inline_workers)
        # Drawing takes most of the time, and reads nothing from the run.
        patch.setattr(collect, "build_page", lambda results, **shown: "page")
        yield patch


def job_file(folder):
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump({**JOB, "run": str(folder)}))
    return path


def measured(text):
    results = json.loads(text)
    return {key: results[key] for key in ("scores", "findings", "quality")} | {
        "scores": [{**score, "seconds": 0} for score in results["scores"]]
    }


def walk(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def finished(patched, tmp_path_factory):
    """A finished run, and what it measured."""
    folder = tmp_path_factory.mktemp("damage") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        code, out, err = call("run", folder, patch)
    assert code == 0, err
    return folder, measured(out)


@pytest.fixture(scope="module")
def interrupted(patched, tmp_path_factory, finished):
    """A run that was interrupted in its last stage, after two checkpoints."""
    folder = tmp_path_factory.mktemp("damage") / "interrupted"
    save, saved = Checkpoints.save, Counter()

    def interrupt(self, *arguments):
        save(self, *arguments)
        saved[self._stage] += 1
        if self._stage == "p_ssl-seed0" and saved[self._stage] == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", interrupt)
        assert call("run", folder, patch)[0] == 130
    return folder, finished[1]


def call(verb, folder, patch):
    """Returns exit code, standard output and standard error of a verb."""
    target = job_file(folder) if verb in ("run", "plan") else folder
    out, err = io.StringIO(), io.StringIO()
    patch.setattr(sys, "argv", ["dist-tl", verb, str(target), "--json"])
    patch.setattr(display.errors, "_file", err)
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code or 0, out.getvalue(), err.getvalue()


def named_error_with_a_remedy(err):
    name, _, text = err.partition(": ")
    kind = getattr(errors, name.split()[-1] if name else "", None)
    remedies = ("again", "choose another", "restore", "wait until", "check ")
    return kind is not None and any(remedy in text for remedy in remedies)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("state", ["finished", "interrupted"])
def test_every_verb_survives_every_damaged_file(state, damage, tmp_path, request, monkeypatch):
    """Of both states, each file, each damage, before each verb that reads the run."""
    original, expected = request.getfixturevalue(state)
    outcomes, wrong = Counter(), []
    for key in walk(original):
        folder = tmp_path / "run"
        shutil.copytree(original, folder)
        DAMAGES[damage](folder / key)
        for verb in ("status", "report", "run"):
            code, out, err = call(verb, folder, monkeypatch)
            if code == 0 and (verb == "status" or measured(out) == expected):
                outcomes[verb, "right"] += 1
            elif code in (2, 3) and named_error_with_a_remedy(err):
                outcomes[verb, "named error"] += 1
            else:
                wrong.append((key, verb, code, err[-300:]))
        shutil.rmtree(folder)
    assert not wrong
    print(f"{state}, {damage}: {dict(outcomes)}")
