"""`dist-tl submit` to a Ray cluster or to Kubernetes, and the pods table of `plan --kube`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dist_tl.cli.display import show_table
from dist_tl.cli.remote import print_line, print_status, watch
from dist_tl.errors import ConfigError, StorageError

if TYPE_CHECKING:  # these take seconds to import, and --help needs none of them
    from dist_tl.deploy.options import KubeOptions
    from dist_tl.deploy.submissions import Submission
    from dist_tl.deploy.summary import KubeRow
    from dist_tl.jobs.spec import JobConfig

JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="Job file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Overrides of the job file, e.g. trainers.workers=1."
    ),
]
Options = Annotated[
    Path | None,
    typer.Option(
        "--options",
        help="Options file of your Kubernetes cluster: image, nodes, limits. Example: "
        "k8s/options.yaml.",
    ),
]


def submit(
    job: JobFile,
    overrides: Overrides = None,
    kube: Annotated[
        bool,
        typer.Option(
            "--kube",
            help="Submit a RayJob to the cluster of your kubectl context; requires --options.",
        ),
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            help="Submit to a running Ray cluster: the URL of its dashboard, e.g. "
            "http://127.0.0.1:8265.",
        ),
    ] = None,
    options: Options = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be submitted, without submitting.")
    ] = False,
    detach: Annotated[
        bool,
        typer.Option(
            "--detach", help="Return immediately; follow the job with `dist-tl logs -f RUN`."
        ),
    ] = False,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Stop an active attempt of the same run first.")
    ] = False,
) -> None:
    """Submit a job to Kubernetes or a Ray cluster, stream its log, and exit with its exit code.

    Submitting the same run again resumes it from the last checkpoint. Ctrl-C leaves the job
    running.
    """
    from dist_tl.jobs.job_file import read_job

    spec = read_job(job, overrides or [])
    if kube == (address is not None):
        raise ConfigError("submit: expected exactly one of --kube and --address URL")
    if kube:
        _submit_kube(spec, cluster_options(options), dry_run, detach, take_over)
    else:
        _submit_ray(spec, str(address), dry_run, detach, take_over)


def cluster_options(path: Path | None) -> "KubeOptions":
    from dist_tl.deploy.options import read_options

    if path is None:
        raise ConfigError(
            "--kube: expected --options FILE with the image and the nodes of your cluster; see "
            "k8s/options.yaml"
        )
    return read_options(path)


def _submit_ray(
    spec: "JobConfig", address: str, dry_run: bool, detach: bool, take_over: bool
) -> None:
    from dist_tl.cluster.submission import ENTRYPOINT, RayJobs
    from dist_tl.deploy.manifests import check_no_secret, run_label
    from dist_tl.deploy.submissions import Submission

    _check_reachable(spec)
    check_no_secret(spec)
    text, label = _job_text(spec), run_label(spec)
    if dry_run:
        print(f"# {ENTRYPOINT}\n{text}", end="")
        return
    cluster = RayJobs(address)
    for name in cluster.running(spec.run):
        if not take_over:
            raise ConfigError(
                f"{name} is still running: follow it with `dist-tl logs -f {spec.run}`, stop it "
                f"with `dist-tl stop {spec.run}`, or submit with --take-over"
            )
        cluster.stop(name)
    name = cluster.submit(text, spec.run, label)
    print_status(f"submitted {name} to {address}")
    remedy = f"follow the job with `ray job logs -f {name} --address {address}`"
    _record(spec, Submission(backend="ray", name=name, address=address), remedy)
    if not detach:
        watch(spec.run, lambda: cluster.follow(name, on_line=print_line))


def _submit_kube(
    spec: "JobConfig", options: "KubeOptions", dry_run: bool, detach: bool, take_over: bool
) -> None:
    from dist_tl.deploy.kube import connect, follow_with_retries
    from dist_tl.deploy.manifests import as_yaml, render
    from dist_tl.deploy.submissions import Submission

    if dry_run:
        print(as_yaml(render(_with_scale(spec), options)), end="")
        return
    kube = connect(options.namespace)
    submitted = kube.submit(_with_scale(spec), options, take_over=take_over)
    submission = Submission(
        backend="kubernetes",
        name=submitted.name,
        namespace=submitted.namespace,
        generators_per_pod=options.generators.workers_per_pod,
    )
    remedy = f"for status, logs and stop, add --kube --namespace {submitted.namespace}"
    _record(spec, submission, remedy)
    if detach:
        print_status(f"submitted RayJob {submitted.name} to namespace {submitted.namespace}")
        return

    def follow() -> int:
        return follow_with_retries(
            kube,
            submitted,
            lambda: _with_scale(spec),
            options,
            max_attempts=options.backoff_limit + 1,
            on_line=print_line,
            on_state=print_status,
        )

    watch(spec.run, follow)


def _with_scale(spec: "JobConfig") -> "JobConfig":
    """Returns the job with the generator bounds that `dist-tl scale` stored in the run, if any."""
    from dist_tl.cluster.scaling import read_scale
    from dist_tl.storage.objects import ObjectStore

    pool = getattr(spec, "generators", None)
    if pool is None:
        return spec
    try:
        scale = read_scale(ObjectStore(spec.run))
    except StorageError:  # unreachable from here: the job reads the override itself
        return spec
    if scale is None:
        return spec
    bounds = {"min": scale.generators.min, "max": max(1, scale.generators.max)}
    return spec.model_copy(update={"generators": pool.model_copy(update=bounds)})


def _record(spec: "JobConfig", submission: "Submission", remedy: str) -> None:
    """Stores the submission in the run, if possible: only the cluster may reach the store."""
    from dist_tl.deploy.submissions import write_submission
    from dist_tl.storage.objects import ObjectStore

    try:
        write_submission(ObjectStore(spec.run), submission)
    except StorageError as error:
        print_status(f"the run's store is unreachable from this machine ({error}); {remedy}")


def _check_reachable(spec: "JobConfig") -> None:
    if spec.store != "direct" or not ("://" in spec.run or spec.run.startswith("/")):
        raise ConfigError(
            "store: the cluster must reach the run: expected store: direct and a URL (or an "
            f"absolute path on one machine or a shared disk), got store: {spec.store} and run: "
            f"{spec.run}; e.g. run=s3://bucket/runs/birds store=direct"
        )


def _job_text(spec: "JobConfig") -> str:
    import yaml

    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, width=100)


def kube_plan(spec: "JobConfig", options: Path | None) -> "list[KubeRow]":
    """Validates the job for Kubernetes and returns its pods, for `dist-tl plan --kube`.

    Raises:
        ConfigError: the job cannot run on Kubernetes, or KubeRay would reject it.
    """
    from dist_tl.deploy.manifests import render
    from dist_tl.deploy.summary import kube_rows

    kube_options = cluster_options(options)
    spec = _with_scale(spec)
    render(spec, kube_options)
    return kube_rows(spec, kube_options)


def show_kube_plan(pods: "Sequence[KubeRow]") -> None:
    """Prints the pods as a table, with their maximum total."""
    rows: list[tuple[str, ...]] = [
        (
            row.group + (" (spot)" if row.spot else ""),
            f"{row.pods_min}..{row.pods_max}" if row.pods_max > row.pods_min else f"{row.pods_min}",
            f"{row.cpus:g}",
            f"{row.gpus}",
            f"{row.memory_gb:g}",
            f"{row.disk_gb:g}",
        )
        for row in pods
    ]
    counts = [row.pods_max for row in pods]
    total = [
        sum(count * value for count, value in zip(counts, values, strict=True))
        for values in (
            [row.cpus for row in pods],
            [row.gpus for row in pods],
            [row.memory_gb for row in pods],
            [row.disk_gb for row in pods],
        )
    ]
    rows.append(("total (maximum)", f"{sum(counts)}", *(f"{value:g}" for value in total)))
    header = ("group", "pods", "CPUs per pod", "GPUs", "memory GiB", "disk GiB")
    show_table("Pods (Kubernetes)", header, rows)
