"""Verbs of `dist-tl` for jobs on other machines: hand in, look, scale, stop.

Where a run was handed in stands in the run itself, so these verbs take the run and nothing else.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from dist_tl.display import console, errors, show_table
from dist_tl.errors import ConfigError, DistTLError, StorageError

if TYPE_CHECKING:  # these take seconds to import, and --help needs none of them
    from dist_tl.deploy.kube import Kube, KubeJob
    from dist_tl.deploy.options import KubeOptions
    from dist_tl.jobs.specs import Job
    from dist_tl.jobs.submissions import Submission

INTERRUPTED = 130
JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the job, e.g. trainers.workers=1."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="Folder or URL of the run.")]
OnKube = Annotated[
    bool,
    typer.Option("--kube", help="Ask Kubernetes alone, where the run's store is out of reach."),
]
Options = Annotated[
    Path | None,
    typer.Option("--options", help="How jobs run on your cluster; see k8s/options.yaml."),
]


class StoppedWatching(SystemExit):
    """Ctrl-C ended the watching; the job goes on."""


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
    from dist_tl.jobs.specs import read_job

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
    _say(f"{name} was handed in to {address}")
    remedy = f"see the job with `ray job logs -f {name} --address {address}`"
    _remember(spec, Submission(where="ray", name=name, address=address), remedy)
    if not detach:
        _watch(spec.run, lambda: cluster.follow(name, on_line=_print_line))


def _submit_kube(
    spec: "Job", options: "KubeOptions", dry_run: bool, detach: bool, take_over: bool
) -> None:
    from dist_tl.deploy.kube import connect, follow_to_the_end
    from dist_tl.deploy.manifests import as_yaml, render
    from dist_tl.jobs.submissions import Submission

    spec = _as_scaled(spec)
    if dry_run:
        print(as_yaml(render(spec, options)), end="")
        return
    kube = connect(options.namespace)
    made = kube.submit(spec, options, take_over=take_over)
    submission = Submission(
        where="kubernetes",
        name=made.name,
        namespace=made.namespace,
        generators_per_pod=options.generators.workers_per_pod,
    )
    _remember(spec, submission, "status, logs and stop: add --kube")
    if detach:
        _say(f"RayJob {made.name} was handed in to namespace {made.namespace}")
        return

    def follow() -> int:
        return follow_to_the_end(
            kube,
            made,
            spec,
            options,
            max_attempts=options.backoff_limit + 1,
            on_line=_print_line,
            on_state=_say,
        )

    _watch(spec.run, follow)


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
        _say(f"the run's store is out of reach from here ({error}); {remedy}")


def _watch(run: str, follow: Callable[[], int]) -> NoReturn:
    try:
        sys.exit(follow())
    except KeyboardInterrupt:
        _say(f"the job goes on; see it with `dist-tl logs -f {run}`, end it with `dist-tl stop`")
        raise StoppedWatching(INTERRUPTED) from None


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


def status(run: Run, kube: OnKube = False, as_json: AsJson = False) -> None:
    """Say how far a run is: what is committed, who started it, where it was handed in."""
    from dist_tl.jobs.status import age, run_status
    from dist_tl.jobs.submissions import read_submission
    from dist_tl.storage.objects import ObjectStore

    if kube:
        _say(f"kubernetes: {_kube_state(run, None)}")
        return
    store = ObjectStore(run)
    found, submission = run_status(store), read_submission(store)
    if as_json:
        print(found.model_dump_json(indent=1))
        return
    started = f", last {age(found.last_started)} on {found.last_host}" if found.last_started else ""
    _say(f"{found.run}: {found.kind}, {found.state}; {found.attempts} starts{started}")
    if found.generators is not None:
        _say(f"generators scaled to {found.generators.min}..{found.generators.max}")
    if found.stages:
        rows = [(row.stage, row.state, row.progress) for row in found.stages]
        show_table("Stages that have begun", ("stage", "state", "progress"), rows)
    if submission is not None:
        try:
            _say(f"{submission.where}: {_state(run, submission)}")
        except DistTLError as error:  # the store has told what counts; the cluster may be gone
            _say(f"{submission.where}: {error}")


def _state(run: str, submission: "Submission") -> str:
    if submission.where == "kubernetes":
        return _kube_state(run, submission.namespace)
    from dist_tl.cluster.submission import RayJobs

    state = RayJobs(str(submission.address)).state(submission.name)
    return f"{submission.name} {state}"


def _kube_state(run: str, namespace: str | None) -> str:
    kube, job = _kube_job(run, namespace)
    found = kube.status(job)
    pods = ", ".join(
        f"{component} {count} {phase}"
        for component, phases in sorted(found.pods.items())
        for phase, count in sorted(phases.items())
    )
    words = (job.name, found.state, found.job_status, found.message, pods and f"({pods})")
    return " ".join(word for word in words if word)


def _kube_job(run: str, namespace: str | None) -> "tuple[Kube, KubeJob]":
    from dist_tl.deploy.kube import connect

    kube = connect(namespace)
    return kube, kube.find(run)


def logs(
    run: Run,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Until the job ends.")] = False,
    kube: OnKube = False,
) -> None:
    """Show what a submitted job printed; with -f until it ends, and with its exit code."""
    submission = _submission(run, kube)
    if submission.where == "ray":
        from dist_tl.cluster.submission import RayJobs

        cluster = RayJobs(str(submission.address))
        if follow:
            _watch(run, lambda: cluster.follow(submission.name, on_line=_print_line))
        print(cluster.log(submission.name), end="")
        return
    found, job = _kube_job(run, submission.namespace)
    if follow:
        _watch(run, lambda: found.follow(job, on_line=_print_line, on_state=_say))
    found.logs(job, False, _print_line)


def stop(run: Run, kube: OnKube = False) -> None:
    """End a submitted job; what is committed stays, and submitting it again goes on from there."""
    submission = _submission(run, kube)
    if submission.where == "ray":
        from dist_tl.cluster.submission import RayJobs

        RayJobs(str(submission.address)).stop(submission.name)
    else:
        found, job = _kube_job(run, submission.namespace)
        found.stop(job)
    _say(f"{run} has stopped; what is committed stays")


def show_kube_plan(spec: "Job", options: Path | None) -> None:
    """The pods of `dist-tl plan --kube`, after KubeRay's own rules were checked.

    Raises:
        ConfigError: the job cannot run on Kubernetes, or KubeRay would refuse it.
    """
    from dist_tl.deploy.manifests import render
    from dist_tl.deploy.summary import kube_rows

    chosen = cluster_options(options)
    render(spec, chosen)
    found = kube_rows(spec, chosen)
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


def scale(
    run: Run,
    sizes: Annotated[
        list[str], typer.Argument(metavar="generators=N", help="Or generators=MIN..MAX.")
    ],
) -> None:
    """Change how many generator workers a running job has; trainers do not notice.

    Holds for later starts of the run too. On Kubernetes the bounds of the pods' group follow.
    """
    from dist_tl.cluster.scaling import Scale, parse_sizes, write_scale
    from dist_tl.jobs.status import check_has_generators
    from dist_tl.jobs.submissions import read_submission
    from dist_tl.storage.objects import ObjectStore

    bounds, store = parse_sizes(sizes), ObjectStore(run)
    check_has_generators(store)
    write_scale(store, Scale(**bounds))
    submission, wanted = read_submission(store), bounds["generators"]
    if submission is not None and submission.where == "kubernetes":
        kube, job = _kube_job(run, submission.namespace)
        each = submission.generators_per_pod
        pods = [math.ceil(workers / each) for workers in (wanted.min, max(1, wanted.max))]
        kube.scale(job, "generators", *pods)
    _say(f"generators: {wanted.min} to {wanted.max}, in a few seconds")


def _submission(run: str, kube: bool) -> "Submission":
    from dist_tl.jobs.submissions import Submission, read_submission
    from dist_tl.storage.objects import ObjectStore

    found = Submission(where="kubernetes", name="") if kube else read_submission(ObjectStore(run))
    if found is None:
        raise ConfigError(
            f"{run} was not handed in by `dist-tl submit`; a job that `dist-tl run` started is "
            "stopped and watched where it runs"
        )
    return found


def _print_line(line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _say(text: str) -> None:
    errors.print(text, highlight=False, markup=False)
