"""`dist-tl status`, `logs`, `stop` and `scale`: manage jobs that run on other machines.

The run's store records where its job was submitted, so these commands need only the run.
"""

import json
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from dist_tl.cli.display import console, errors, show_table
from dist_tl.cli.endings import interrupted_code
from dist_tl.errors import ConfigError, DistTLError

if TYPE_CHECKING:  # these take seconds to import, and --help needs none of them
    from dist_tl.cluster.scaling import Bounds
    from dist_tl.deploy.kube import Kube, KubeJob
    from dist_tl.deploy.submissions import Submission

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="Folder or URL of the run.")]
OnKube = Annotated[
    bool,
    typer.Option(
        "--kube",
        help="Query Kubernetes only, if the run's store cannot be reached from this machine.",
    ),
]
Namespace = Annotated[
    str | None,
    typer.Option(
        "-n",
        "--namespace",
        help="Namespace of the job, with --kube. Default: that of the kubectl context.",
    ),
]


def watch(run: str, follow: Callable[[], int]) -> NoReturn:
    """Follows a job until it ends and exits with its exit code; Ctrl-C leaves it running."""
    try:
        sys.exit(follow())
    except KeyboardInterrupt:
        print_status(
            f"the job keeps running; follow it with `dist-tl logs -f {run}`, stop it with "
            f"`dist-tl stop {run}`"
        )
        sys.exit(interrupted_code())


def status(
    run: Run, kube: OnKube = False, namespace: Namespace = None, as_json: AsJson = False
) -> None:
    """Show the status of a run: attempts, progress of its stages, state of its job."""
    from dist_tl.deploy.submissions import read_submission
    from dist_tl.report.status import age, run_status
    from dist_tl.storage.objects import ObjectStore

    if kube:
        state = _kube_state(run, namespace)
        print(json.dumps({"run": run, "cluster": state}, indent=1) if as_json else state)
        return
    store = ObjectStore(run)
    report, submission = run_status(store), read_submission(store)
    if submission is not None:
        report = report.model_copy(update={"cluster": _cluster_state(run, submission)})
    if as_json:
        print(report.model_dump_json(indent=1, ensure_ascii=True))
        return
    attempts = f"{report.attempts} attempt{'' if report.attempts == 1 else 's'}"
    if report.last_started:
        attempts += f", last started {age(report.last_started)} on {report.last_host}"
    print_line(f"{report.run}: {report.kind}, {report.state}; {attempts}")
    if report.generators is not None:
        print_line(f"generators scaled to {report.generators.min}..{report.generators.max}")
    if report.stages:
        rows = [(row.stage, row.state, row.progress) for row in report.stages]
        show_table("Stages", ("stage", "state", "progress"), rows)
    if report.cluster is not None:
        print_line(report.cluster)


def _cluster_state(run: str, submission: "Submission") -> str:
    """Returns the state of the job, or the error: the cluster may be gone, the run is not."""
    try:
        return f"{submission.backend}: {_job_state(run, submission)}"
    except DistTLError as error:
        return f"{submission.backend}: {error}"


def _job_state(run: str, submission: "Submission") -> str:
    if submission.backend == "kubernetes":
        return _kube_state(run, submission.namespace)
    from dist_tl.cluster.submission import RayJobs

    state = RayJobs(str(submission.address)).state(submission.name)
    return f"{submission.name} {state}"


def _kube_state(run: str, namespace: str | None) -> str:
    kube, job = _kube_job(run, namespace)
    report = kube.status(job)
    pods = ", ".join(
        f"{component} {count} {phase}"
        for component, phases in sorted(report.pods.items())
        for phase, count in sorted(phases.items())
    )
    parts = (job.name, report.state, report.job_status, report.message, pods and f"({pods})")
    return " ".join(part for part in parts if part)


def _kube_job(run: str, namespace: str | None) -> "tuple[Kube, KubeJob]":
    from dist_tl.deploy.kube import connect

    kube = connect(namespace)
    return kube, kube.find(run)


def logs(
    run: Run,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Stream the log until the job ends.")
    ] = False,
    kube: OnKube = False,
    namespace: Namespace = None,
) -> None:
    """Print the log of a submitted job; with -f, stream it and exit with the job's exit code."""
    submission = _submission(run, kube, namespace)
    if submission.backend == "ray":
        from dist_tl.cluster.submission import RayJobs

        cluster = RayJobs(str(submission.address))
        if follow:
            watch(run, lambda: cluster.follow(submission.name, on_line=print_line))
        print(cluster.log(submission.name), end="")
        return
    client, job = _kube_job(run, submission.namespace)
    if follow:
        watch(run, lambda: client.follow(job, on_line=print_line, on_state=print_status))
    client.logs(job, False, print_line)


def stop(run: Run, kube: OnKube = False, namespace: Namespace = None) -> None:
    """Stop a submitted job. Committed work is kept; submitting the job again resumes it."""
    submission = _submission(run, kube, namespace)
    if submission.backend == "ray":
        from dist_tl.cluster.submission import RayJobs

        RayJobs(str(submission.address)).stop(submission.name)
    else:
        client, job = _kube_job(run, submission.namespace)
        client.stop(job)
    print_status(f"stopped {run}; committed work is kept")


def scale(
    run: Run,
    sizes: Annotated[
        list[str],
        typer.Argument(
            metavar="generators=N",
            help="Number of workers, or generators=MIN..MAX to autoscale within bounds.",
        ),
    ],
) -> None:
    """Change the number of generator workers of a running job. Trainers are not affected.

    The override also applies to later attempts of the run. On Kubernetes, the replica bounds of
    the generators' worker group change too.
    """
    from dist_tl.cluster.scaling import Scale, parse_sizes, write_scale
    from dist_tl.deploy.submissions import read_submission
    from dist_tl.report.status import check_has_generators
    from dist_tl.storage.objects import ObjectStore

    bounds, store = parse_sizes(sizes), ObjectStore(run)
    check_has_generators(store)
    write_scale(store, Scale(**bounds))
    submission, workers = read_submission(store), bounds["generators"]
    if submission is not None and submission.backend == "kubernetes":
        _scale_pods(run, submission, workers)
    print_status(f"generators: {workers.min} to {workers.max} workers, effective within seconds")


def _scale_pods(run: str, submission: "Submission", workers: "Bounds") -> None:
    per_pod = submission.generators_per_pod
    pods = [math.ceil(count / per_pod) for count in (workers.min, max(1, workers.max))]
    try:
        kube, job = _kube_job(run, submission.namespace)
        kube.scale(job, "generators", *pods)
    except DistTLError:
        print_status(
            "the override is stored for later attempts of the run, but the pods were not scaled:"
        )
        raise


def _submission(run: str, kube: bool, namespace: str | None) -> "Submission":
    from dist_tl.deploy.submissions import Submission, read_submission
    from dist_tl.storage.objects import ObjectStore

    if kube:
        return Submission(backend="kubernetes", name="", namespace=namespace)
    submission = read_submission(ObjectStore(run))
    if submission is None:
        raise ConfigError(
            f"{run} was not submitted with `dist-tl submit`; a job started with `dist-tl run` logs "
            "to its own terminal and is stopped there"
        )
    return submission


def print_line(line: str) -> None:
    """Prints a line of a job's log to standard output."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_status(text: str) -> None:
    """Prints a status message to standard error."""
    errors.print(text, highlight=False, markup=False)
