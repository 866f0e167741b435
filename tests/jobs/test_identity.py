"""What a run is: another content under the same path is refused, the same content elsewhere not."""

import json
import os
import shutil

import numpy as np
import pytest
import yaml
from inline_workers import InlineWorkers, open_inline_workers
from PIL import Image
from safetensors.numpy import load_file, save_file
from sklearn.datasets import load_digits

from dist_tl.jobs import run as jobs_run
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore

TRAINING = {"steps": 2, "batch_size": 8}
SOURCE = {
    "data": {"source": "digits", "classes": ["0", "1", "2"], "limit": 60},
    "holdout_folds": 4,
    "classifier": {"kind": "resnet", "width": 4, "blocks": [1]},
    "classifier_training": TRAINING,
    "generator": {"channels": [8], "num_steps": 2},
    "generator_training": TRAINING,
}


@pytest.fixture(autouse=True)
def inline(alone, monkeypatch, tmp_path):
    monkeypatch.setattr(jobs_run, "open_workers", open_inline_workers)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    """Two classes of digits as files, old enough for their hashes to be cached."""
    digits, root = load_digits(), tmp_path / "data"
    for label, name in ((5, "five"), (6, "six")):
        (root / name).mkdir(parents=True)
        for i, image in enumerate(digits.images[digits.target == label][:12]):
            path = root / name / f"{i:02d}.png"
            Image.fromarray((image * 15).astype(np.uint8)).save(path)
            os.utime(path, (1e9, 1e9))
    return root


@pytest.fixture(scope="module")
def models(alone, tmp_path_factory):
    """A trained source: the folder of a run of kind source."""
    root = tmp_path_factory.mktemp("source")
    path = root / "job.yaml"
    job = {"kind": "source", "run": str(root / "run"), "source": SOURCE}
    job |= {"lanes": 1, "trainers": {"workers": 1}}
    path.write_text(yaml.safe_dump(job))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs_run, "open_workers", open_inline_workers)
        from dist_tl.jobs.job_file import read_job
        from dist_tl.telemetry import SilentProgress

        jobs_run.run_job(read_job(path), SilentProgress())
    return root / "run" / "stages"


@pytest.fixture
def transfer(tmp_path, command):
    """Runs a transfer job on a folder; returns exit code, output and errors."""

    def run(folder, source=SOURCE, name="run", **changes):
        job = {
            "kind": "transfer",
            "run": str(tmp_path / name),
            "seeds": 2,
            "lanes": 1,
            "trainers": {"workers": 1},
            "source": source,
            "target": {
                "data": {"source": "folder", "path": str(folder)},
                "labels_per_class": 2,
                "network": {"kind": "resnet", "width": 4, "blocks": [1], "norm": "group"},
                "training": TRAINING,
            },
            "arms": ["scratch"],
            **changes,
        }
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(job))
        return command("run", path, "--json")

    return run


def scores(out):
    return [(score["seed"], score["correct"]) for score in json.loads(out)["scores"]]


def test_the_same_path_with_other_content_is_refused_and_the_files_are_named(folder, transfer):
    code, out, _ = transfer(folder)
    assert code == 0
    (folder / "five" / "03.png").rename(folder / "six" / "99.png")
    (folder / "six" / "00.png").write_bytes((folder / "six" / "01.png").read_bytes())
    code, _, err = transfer(folder)
    assert code == 2
    assert "began with other inputs" in err
    assert "target.data.path: six/99.png is new, five/03.png is gone, six/00.png differs" in err
    assert "Restore them" in err
    (folder / "six" / "99.png").rename(folder / "five" / "03.png")
    assert transfer(folder)[0] == 2, "one file still differs"
    assert transfer(folder, name="another")[0] == 0
    assert out


def test_the_same_content_elsewhere_is_the_same_run(folder, transfer, tmp_path):
    code, out, _ = transfer(folder)
    assert code == 0
    results = tmp_path / "run" / layout.RESULTS
    before = results.read_bytes()
    shutil.move(folder, tmp_path / "moved")
    code, again, err = transfer(tmp_path / "moved")
    assert (code, scores(again)) == (0, scores(out))
    assert "has finished" in err
    # Also where work remains: finished stages are read, not refused.
    results.unlink()
    code, again, err = transfer(tmp_path / "moved")
    assert (code, scores(again)) == (0, scores(out))
    assert results.read_bytes() != before


def test_data_that_changes_between_two_seeds_is_refused(folder, transfer, monkeypatch):
    train, trained = InlineWorkers._train_one, []

    def change_after_the_first(self, spec):
        result = train(self, spec)
        trained.append(spec.name)
        if spec.name == "scratch-seed0":
            (folder / "six" / "00.png").write_bytes((folder / "six" / "01.png").read_bytes())
            from dist_tl.train import rows

            rows._load_cached.cache_clear()  # as in another worker
        return result

    monkeypatch.setattr(InlineWorkers, "_train_one", change_after_the_first)
    code, _, err = transfer(folder)
    assert code == 2
    assert "has changed since the run started" in err
    assert "scratch-seed1" not in trained


def test_without_job_json_another_job_is_refused_and_the_same_one_goes_through(
    folder, transfer, tmp_path
):
    code, out, _ = transfer(folder)
    assert code == 0
    job = tmp_path / "run" / layout.JOB
    before = job.read_bytes()
    for damage in (job.unlink, lambda: job.write_bytes(before[:100])):
        damage()
        code, _, err = transfer(folder, seed=7)
        assert code == 2
        assert "holds another job, and its job.json is missing or damaged" in err
        code, again, _ = transfer(folder)
        assert (code, scores(again)) == (0, scores(out))
        assert json.loads(job.read_bytes())["job"] == json.loads(before)["job"]
    shutil.rmtree(tmp_path / "run" / layout.ATTEMPTS)
    (tmp_path / "run" / layout.RESULTS).unlink()
    job.unlink()
    code, _, err = transfer(folder)
    assert code == 2
    assert "holds stages of an unknown job" in err


def assets(root):
    return {
        "classifier": str(root / "source-classifier/model"),
        "generator": {"kind": "diffusion", "path": str(root / "source-generator/model")},
    }


def change_one_weight(path):
    """Changes a weight and the digest beside it: another model, not a damaged one."""
    tensors = load_file(path)
    tensors[sorted(tensors)[0]].flat[0] += 1
    save_file(tensors, path)
    (path.parent / "SHA256SUMS").unlink()


@pytest.mark.parametrize("name", ["source-classifier", "source-generator"])
def test_a_model_with_one_changed_weight_is_another_input(folder, transfer, models, tmp_path, name):
    shutil.copytree(models, tmp_path / "models")
    source = assets(tmp_path / "models")
    assert transfer(folder, source)[0] == 0
    shutil.move(tmp_path / "models", tmp_path / "elsewhere")
    assert transfer(folder, assets(tmp_path / "elsewhere"))[0] == 0
    change_one_weight(tmp_path / "elsewhere" / name / "model" / "model.safetensors")
    code, _, err = transfer(folder, assets(tmp_path / "elsewhere"))
    assert code == 2
    assert "model.safetensors differs" in err
    assert name.removeprefix("source-") in err


def test_a_damaged_model_is_refused_before_the_run(folder, transfer, models, tmp_path):
    shutil.copytree(models, tmp_path / "models")
    path = tmp_path / "models/source-classifier/model/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    code, _, err = transfer(folder, assets(tmp_path / "models"))
    assert code == 3
    assert "model.safetensors differs from its digest in SHA256SUMS; copy the folder again" in err
    assert not ObjectStore(tmp_path / "run").list(layout.ATTEMPTS)


@pytest.mark.parametrize("options", [{"channels": 1}, {"limit": 50}, {"size": 8}, {}])
def test_source_data_is_recognised_whatever_is_done_to_its_pixels(folder, transfer, options):
    source = {**SOURCE, "data": {"source": "folder", "path": str(folder), "limit": 20}}
    target = {
        "data": {
            "source": "folder",
            "path": str(shutil.copytree(folder, folder.parent / "copy")),
            **options,
        },
        "labels_per_class": 2,
        "network": {"kind": "resnet", "width": 4, "blocks": [1], "norm": "group"},
        "training": TRAINING,
    }
    code, _, err = transfer(folder, source, target=target)
    assert code == 2
    assert "would read source data after the source phase" in err


def test_a_job_file_can_insist_on_a_content(folder, transfer, tmp_path):
    code, _, err = transfer(f"{folder}#sha256=0123456789abcdef")
    assert code == 2
    assert "expected the content with the digest 0123456789abcdef, as the job file says" in err
    digest = err.partition("found ")[2][:16]
    assert transfer(f"{folder}#sha256={digest}")[0] == 0
    assert transfer(folder)[0] == 0, "the same input, pinned or not"


def test_a_run_that_has_finished_with_an_input_resumes_without_it(folder, transfer, tmp_path):
    source = {**SOURCE, "data": {"source": "folder", "path": str(folder), "limit": 20}}
    digits = {"source": "digits", "classes": ["5", "6"], "limit": 40}
    target = {
        "data": digits,
        "labels_per_class": 2,
        "network": {"kind": "resnet", "width": 4, "blocks": [1], "norm": "group"},
        "training": TRAINING,
    }
    code, out, _ = transfer(folder, source, target=target)
    assert code == 0
    shutil.rmtree(folder)
    (tmp_path / "run" / layout.RESULTS).unlink()
    (tmp_path / "run" / layout.result_key("scratch-seed1")).unlink()
    code, again, err = transfer(folder, source, target=target)
    assert (code, scores(again)) == (0, scores(out)), err
    code, _, err = transfer(folder, source, target=target, name="new")
    assert code == 2
    assert "expected a folder at" in err
