"""`dist-tl submit`: hand a job to a Ray cluster or to Kubernetes; and what `plan --kube` shows."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dist_tl.cli.display import show_table
from dist_tl.cli.remote import print_line, say, watch
from dist_tl.errors import ConfigError, StorageError

if TYPE_CHECKING:  # these take seconds to import, and --help needs none of them
    from dist_tl.deploy.options import KubeOptions
    from dist_tl.deploy.summary import KubeRow
    from dist_tl.jobs.job_file import Job
    from dist_tl.jobs.submissions import Submission

JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the job, e.g. trainers.workers=1."),
]
Options = Annotated[
    Path | None,
    typer.Option("--options", help="How jobs run on your cluster; see k8s/options.yaml."),
]


def submit(
    job: JobFile,
    overrides: Overrides = None,
    kube: Annotated[
        bool, typer.Option("--kube", help="A RayJob on the Kubernetes of your kubectl context.")
    ] = False,
    address: Annotated[
        str | None,
        typer.Option("--address", help="A Ray cluster that runs, by its dashboard's URL."),
    ] = None,
    options: Options = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be handed in; start nothing.")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="Do not wait; see `dist-tl logs -f RUN`.")
    ] = False,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Stop an earlier attempt that still runs.")
    ] = False,
) -> None:
    """Hand a job to a cluster, follow it, and end with its exit code.

    Handing in the same run again goes on from what is committed. Ctrl-C leaves the job running.
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
            "--kube: expected --options FILE, which names the image and the nodes of your cluster; "
            "k8s/options.yaml is an example"
        )
    return read_options(path)


def _submit_ray(spec: "Job", address: str, dry_run: bool, detach: bool, take_over: bool) -> None:
    from dist_tl.cluster.submission import ENTRYPOINT, RayJobs
    from dist_tl.deploy.manifests import check_no_secret, run_label
    from dist_tl.jobs.submissions import Submission

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
                f"{name} still runs: follow it with `dist-tl logs -f {spec.run}`, stop it with "
                f"`dist-tl stop {spec.run}`, or submit with --take-over"
            )
        cluster.stop(name)
    name = cluster.submit(text, spec.run, label)
    say(f"{name} was handed in to {address}")
    remedy = f"see the job with `ray job logs -f {name} --address {address}`"
    _remember(spec, Submission(where="ray", name=name, address=address), remedy)
    if not detach:
        watch(spec.run, lambda: cluster.follow(name, on_line=print_line))


def _submit_kube(
    spec: "Job", options: "KubeOptions", dry_run: bool, detach: bool, take_over: bool
) -> None:
    from dist_tl.deploy.kube import connect, follow_to_the_end
    from dist_tl.deploy.manifests import as_yaml, render
    from dist_tl.jobs.submissions import Submission

    if dry_run:
        print(as_yaml(render(_as_scaled(spec), options)), end="")
        return
    kube = connect(options.namespace)
    made = kube.submit(_as_scaled(spec), options, take_over=take_over)
    submission = Submission(
        where="kubernetes",
        name=made.name,
        namespace=made.namespace,
        generators_per_pod=options.generators.workers_per_pod,
    )
    remedy = f"status, logs and stop: add --kube --namespace {made.namespace}"
    _remember(spec, submission, remedy)
    if detach:
        say(f"RayJob {made.name} was handed in to namespace {made.namespace}")
        return

    def follow() -> int:
        return follow_to_the_end(
            kube,
            made,
            lambda: _as_scaled(spec),
            options,
            max_attempts=options.backoff_limit + 1,
            on_line=print_line,
            on_state=say,
        )

    watch(spec.run, follow)


def _as_scaled(spec: "Job") -> "Job":
    """With the generators that `dist-tl scale` asked for in an earlier start of the run."""
    from dist_tl.cluster.scaling import read_scale
    from dist_tl.storage.objects import ObjectStore

    pool = getattr(spec, "generators", None)
    if pool is None:
        return spec
    try:
        scale = read_scale(ObjectStore(spec.run))
    except StorageError:  # out of reach from here: the job reads it, the pods' bounds are its own
        return spec
    if scale is None:
        return spec
    bounds = {"min": scale.generators.min, "max": max(1, scale.generators.max)}
    return spec.model_copy(update={"generators": pool.model_copy(update=bounds)})


def _remember(spec: "Job", submission: "Submission", remedy: str) -> None:
    """Best effort: the job has been handed in, and a store may be in the cluster's reach only."""
    from dist_tl.jobs.submissions import write_submission
    from dist_tl.storage.objects import ObjectStore

    try:
        write_submission(ObjectStore(spec.run), submission)
    except StorageError as error:
        say(f"the run's store is out of reach from here ({error}); {remedy}")


def _check_reachable(spec: "Job") -> None:
    if spec.store != "direct" or not ("://" in spec.run or spec.run.startswith("/")):
        raise ConfigError(
            "store: the cluster must reach the run: expected store: direct and a URL (or, on one "
            f"machine or a shared disk, an absolute path), got store: {spec.store} and run: "
            f"{spec.run}; e.g. run=s3://bucket/runs/birds store=direct"
        )


def _job_text(spec: "Job") -> str:
    import yaml

    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, width=100)


def kube_plan(spec: "Job", options: Path | None) -> "list[KubeRow]":
    """The pods of `dist-tl plan --kube`, after KubeRay's own rules were checked.

    Raises:
        ConfigError: the job cannot run on Kubernetes, or KubeRay would refuse it.
    """
    from dist_tl.deploy.manifests import render
    from dist_tl.deploy.summary import kube_rows

    chosen = cluster_options(options)
    spec = _as_scaled(spec)
    render(spec, chosen)
    return kube_rows(spec, chosen)


def show_kube_plan(found: "Sequence[KubeRow]") -> None:
    """The pods as a table, and what they are in all."""
    rows = [
        (
            row.group + (" (spot)" if row.spot else ""),
            f"{row.pods_min}..{row.pods_max}" if row.pods_max > row.pods_min else f"{row.pods_min}",
            f"{row.cpus:g}",
            f"{row.gpus}",
            f"{row.memory_gb:g}",
            f"{row.disk_gb:g}",
        )
        for row in found
    ]
    most = [row.pods_max for row in found]
    total = [
        sum(n * value for n, value in zip(most, values, strict=True))
        for values in (
            [row.cpus for row in found],
            [row.gpus for row in found],
            [row.memory_gb for row in found],
            [row.disk_gb for row in found],
        )
    ]
    rows.append(("all, at most", f"{sum(most)}", *(f"{value:g}" for value in total)))
    header = ("group", "pods", "CPUs a pod", "GPUs", "memory GiB", "disk GiB")
    show_table("Pods (Kubernetes)", header, rows)
