"""The rows of `dist-tl plan --kube` agree with the manifests."""

from crd_schemas import templates_of

from dist_tl.deploy.manifests import render
from dist_tl.deploy.summary import kube_rows


def test_rows_agree_with_the_manifests(job_of, options):
    job = job_of("digits", "generators.gpus=1", "generators.max=6")
    settings = options(generators={"spot": True, "memory_gb": 3}, head={"cpus": 1.5})
    rows = {row.group: row for row in kube_rows(job, settings)}
    assert list(rows) == ["head", "trainers", "generators"]
    manifest = next(m for m in render(job, settings) if m["kind"] == "RayJob")
    specs = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    for group in specs:
        row = rows[group["groupName"]]
        assert (row.pods_min, row.pods_max) == (group["minReplicas"], group["maxReplicas"])
    for name, template in templates_of(manifest).items():
        if name != "submitter":
            limits = template["spec"]["containers"][0]["resources"]["limits"]
            row = rows[name]
            millis = int(limits["cpu"][:-1]) if limits["cpu"].endswith("m") else None
            assert row.cpus == (millis / 1000 if millis else int(limits["cpu"]))
            assert row.memory_gb == int(limits["memory"].removesuffix("Gi"))
            assert row.gpus == int(limits.get("nvidia.com/gpu", 0))
    assert [row.spot for row in rows.values()] == [False, False, True]


def test_a_predict_job_has_a_head_and_experts(predict_job, options):
    assert [row.group for row in kube_rows(predict_job(), options())] == ["head", "experts"]
