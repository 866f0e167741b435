"""Verbs of `dist-tl` for jobs that run on other machines: look, scale, stop.

Where a run was handed in stands in the run itself, so these verbs take the run and nothing else.
"""

import json
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from dist_tl.cli.display import console, errors, show_table
from dist_tl.errors import ConfigError, DistTLError

if TYPE_CHECKING:  # these take seconds to import, and --help needs none of them
    from dist_tl.cluster.scaling import Bounds
    from dist_tl.deploy.kube import Kube, KubeJob
    from dist_tl.jobs.submissions import Submission

INTERRUPTED = 130
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="Folder or URL of the run.")]
OnKube = Annotated[
    bool,
    typer.Option("--kube", help="Ask Kubernetes alone, where the run's store is out of reach."),
]
Namespace = Annotated[
    str | None,
    typer.Option(
        "-n",
        "--namespace",
        help="With --kube: where the job is; absent: the kubectl context's.",
    ),
]


def watch(run: str, follow: Callable[[], int]) -> NoReturn:
    """Follow a job to its end and end with its exit code; Ctrl-C leaves it running."""
    try:
        sys.exit(follow())
    except KeyboardInterrupt:
        say(f"the job goes on; see it with `dist-tl logs -f {run}`, end it with `dist-tl stop`")
        sys.exit(INTERRUPTED)


def status(
    run: Run, kube: OnKube = False, namespace: Namespace = None, as_json: AsJson = False
) -> None:
    """Say how far a run is: what is committed, who started it, where it was handed in."""
    from dist_tl.jobs.status import age, run_status
    from dist_tl.jobs.submissions import read_submission
    from dist_tl.storage.objects import ObjectStore

    if kube:
        state = _kube_state(run, namespace)
        print(json.dumps({"run": run, "cluster": state}, indent=1) if as_json else state)
        return
    store = ObjectStore(run)
    found, submission = run_status(store), read_submission(store)
    if submission is not None:
        found = found.model_copy(update={"cluster": _state_or_why_not(run, submission)})
    if as_json:
        print(found.model_dump_json(indent=1))
        return
    started = f", last {age(found.last_started)} on {found.last_host}" if found.last_started else ""
    print_line(f"{found.run}: {found.kind}, {found.state}; {found.attempts} starts{started}")
    if found.generators is not None:
        print_line(f"generators scaled to {found.generators.min}..{found.generators.max}")
    if found.stages:
        rows = [(row.stage, row.state, row.progress) for row in found.stages]
        show_table("Stages that have begun", ("stage", "state", "progress"), rows)
    if found.cluster is not None:
        print_line(found.cluster)


def _state_or_why_not(run: str, submission: "Submission") -> str:
    """The store has told what counts; the cluster may be gone."""
    try:
        return f"{submission.where}: {_state(run, submission)}"
    except DistTLError as error:
        return f"{submission.where}: {error}"


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
    namespace: Namespace = None,
) -> None:
    """Show what a submitted job printed; with -f until it ends, and with its exit code."""
    submission = _submission(run, kube, namespace)
    if submission.where == "ray":
        from dist_tl.cluster.submission import RayJobs

        cluster = RayJobs(str(submission.address))
        if follow:
            watch(run, lambda: cluster.follow(submission.name, on_line=print_line))
        print(cluster.log(submission.name), end="")
        return
    found, job = _kube_job(run, submission.namespace)
    if follow:
        watch(run, lambda: found.follow(job, on_line=print_line, on_state=say))
    found.logs(job, False, print_line)


def stop(run: Run, kube: OnKube = False, namespace: Namespace = None) -> None:
    """End a submitted job; what is committed stays, and submitting it again goes on from there."""
    submission = _submission(run, kube, namespace)
    if submission.where == "ray":
        from dist_tl.cluster.submission import RayJobs

        RayJobs(str(submission.address)).stop(submission.name)
    else:
        found, job = _kube_job(run, submission.namespace)
        found.stop(job)
    say(f"{run} has stopped; what is committed stays")


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
        _scale_pods(run, submission, wanted)
    say(f"generators: {wanted.min} to {wanted.max}, in a few seconds")


def _scale_pods(run: str, submission: "Submission", wanted: "Bounds") -> None:
    each = submission.generators_per_pod
    pods = [math.ceil(workers / each) for workers in (wanted.min, max(1, wanted.max))]
    try:
        kube, job = _kube_job(run, submission.namespace)
        kube.scale(job, "generators", *pods)
    except DistTLError:
        say("the size is kept for later starts of the run; that of the pods did not change:")
        raise


def _submission(run: str, kube: bool, namespace: str | None) -> "Submission":
    from dist_tl.jobs.submissions import Submission, read_submission
    from dist_tl.storage.objects import ObjectStore

    if kube:
        return Submission(where="kubernetes", name="", namespace=namespace)
    found = read_submission(ObjectStore(run))
    if found is None:
        raise ConfigError(
            f"{run} was not handed in by `dist-tl submit`; a job that `dist-tl run` started is "
            "stopped and watched where it runs"
        )
    return found


def print_line(line: str) -> None:
    """A line of a job's log."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def say(text: str) -> None:
    """A word beside the results, on standard error."""
    errors.print(text, highlight=False, markup=False)
