"""Cluster options: defaults, validation, error messages."""

from importlib.metadata import version

import pytest

from dist_tl.deploy.options import GroupOptions, KubeOptions, read_options
from dist_tl.errors import ConfigError


def options_file(tmp_path, text):
    path = tmp_path / "options.yaml"
    path.write_text(text)
    return path


def test_only_the_image_is_required(tmp_path):
    options = read_options(options_file(tmp_path, "image: registry.example/dist-tl:1\n"))
    assert options.ray_version == version("ray")
    assert options.generators.grace_s > options.trainers.grace_s


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image: x\nimages: y", "did you mean 'image'"),
        ("namespace: a", "image: this key is required"),
        ("image: x\nnamespace: My_Space", "namespace"),
        ("image: x\nbackoff_limit: -1", "backoff_limit"),
        ("image: x\nenv: {AWS_SECRET_ACCESS_KEY: abc}", "credentials"),
        ("image: x\nenv: {HF_TOKEN: abc}", "credentials"),
        ("image: x\nendpoint_url: http://me:pass@s3.example", "login"),
        ("image: x\ntrainers: {memory_gb: 4, shm_gb: 3}", "half of memory_gb"),
        ("image: x\ntrainers: {gpu_resource: nvidia}", "gpu_resource"),
        ("image: x\ngenerators: {tolerations: [{key: a}]}", "value with operator Equal"),
        ("image: x\nrun_as_user: 0", "run_as_user"),
    ],
)
def test_invalid_options_are_rejected_with_the_reason(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_options(options_file(tmp_path, text))


def test_the_path_of_a_token_is_not_a_secret():
    env = {"AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/token", "AWS_REGION": "eu-west-1"}
    assert KubeOptions(image="x", env=env).env == env


def test_spot_nodes_are_tolerated_only_on_request():
    assert GroupOptions().all_tolerations() == ()
    keys = {t.key for t in GroupOptions(spot=True).all_tolerations()}
    assert "cloud.google.com/gke-spot" in keys


def test_a_missing_file_is_reported():
    with pytest.raises(ConfigError, match="cannot read the options file"):
        read_options("nowhere.yaml")
